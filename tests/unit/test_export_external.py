"""Weights of an ONNX graph: only in plain files beside it, never past their end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from prunekit.core.errors import ExportError
from prunekit.export._external import external_files


def tensor(name: str, location: str, offset: str = "0", length: str = "16") -> TensorProto:
    """Four float32 numbers kept in another file."""
    proto = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        proto.external_data.add(key=key, value=value)
    return proto


def write(folder: Path, weight: TensorProto, *, inside_branch: bool = False) -> Path:
    """A graph of one node that reads the weight; in the branch of an `If` on request."""
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    if inside_branch:
        branch = helper.make_graph([helper.make_node("Constant", [], ["y"], value=weight)], "branch", [], [out])
        condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        graph = helper.make_graph([node], "g", [condition], [out])
    else:
        graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [out], initializer=[weight])
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


def test_file_beside_the_graph_is_listed(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(bytes(16))
    assert external_files(write(tmp_path, tensor("w", "w.data"))) == (tmp_path / "w.data",)


@pytest.mark.parametrize("location", ["../w.data", "/etc/passwd", "sub/w.data", "", "..", "absent.data"])
def test_place_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "onnx"
    (folder / "sub").mkdir(parents=True)
    for file in (tmp_path / "w.data", folder / "sub" / "w.data"):
        file.write_bytes(bytes(16))
    with pytest.raises(ExportError, match="keeps weight `w`"):
        external_files(write(folder, tensor("w", location)))


def test_link_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(bytes(16))
    (folder / "w.data").symlink_to(tmp_path / "w.data")
    with pytest.raises(ExportError, match="keeps weight `w`"):
        external_files(write(folder, tensor("w", "w.data")))


@pytest.mark.parametrize(("offset", "length"), [("4", "16"), ("0", "17"), ("-4", "16"), ("0", "-1")])
def test_range_past_the_file_is_refused(tmp_path: Path, offset: str, length: str) -> None:
    (tmp_path / "w.data").write_bytes(bytes(16))
    with pytest.raises(ExportError, match="lies outside"):
        external_files(write(tmp_path, tensor("w", "w.data", offset, length)))


def test_range_that_is_no_number_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.data").write_bytes(bytes(16))
    with pytest.raises(ExportError, match="no number"):
        external_files(write(tmp_path, tensor("w", "w.data", "zero")))


def test_weight_inside_a_branch_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="keeps weight `w`"):
        external_files(write(tmp_path, tensor("w", "../w.data"), inside_branch=True))


def test_broken_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ExportError, match="not a readable ONNX file"):
        external_files(tmp_path / "model.onnx")


def test_graph_with_its_weights_inside_needs_no_file(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.zeros(4, "float32"), "w")
    assert external_files(write(tmp_path, weight)) == ()
