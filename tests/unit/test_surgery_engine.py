"""What a cut folder holds besides the right numbers, and what is refused."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import CheckpointError, PlanError, SurgeryError
from prunekit.core.files import atomic_folder
from prunekit.plan.layout import Layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine, sidecar
from tests.tiny import write_tiny

BLOCK_1 = ("blocks.1.attention", "blocks.1.ffn")
BELONGS = (
    "LICENSE",
    "USE_POLICY.md",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "tokenization_own.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",
    "additional_chat_templates/tools.jinja",
)
FOREIGN = (
    ".hidden.json",
    "README.md",
    "all_results.json",
    "flax_model.msgpack",
    "model.gguf",
    "model.onnx",
    "modeling_prunekit.py",
    "other.safetensors",
    "prunekit.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "trainer_state.json",
    "training_args.bin",
    "checkpoint-500/config.json",
    "onnx/config.json",
    "runs/events.txt",
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_tiny("llama", tmp_path / "source")


def cut(source: Path, target: Path, drop: tuple[str, ...] = BLOCK_1) -> Layout:
    view = ModelView.open(source)
    with atomic_folder(target) as folder:
        return engine.apply(view, Plan.make(view, drop), folder)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_files_of_the_model_come_along_and_others_do_not(source: Path, tmp_path: Path) -> None:
    for name in (*BELONGS, *FOREIGN):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(name.encode())
    cut(source, tmp_path / "cut")
    own = {"config.json", "model.safetensors", "generation_config.json"}
    assert names(tmp_path / "cut") == {*BELONGS, *own}
    assert all((tmp_path / "cut" / name).read_bytes() == name.encode() for name in BELONGS)


def test_heterogeneous_folder_has_its_modeling_file(source: Path, tmp_path: Path) -> None:
    (source / "modeling_prunekit.py").write_text("raise SystemExit('somebody else wrote this')")
    assert cut(source, tmp_path / "cut", BLOCK_1[:1]).kind == "heterogeneous"
    ours = Path(engine.__file__).parents[1] / "modeling" / "modeling_prunekit.py"
    assert (tmp_path / "cut" / "modeling_prunekit.py").read_bytes() == ours.read_bytes()


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling"])
def test_link_out_of_the_folder_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_text("secret")
    (source / name).symlink_to(outside / "config.json" if name.endswith("json") else outside)
    with pytest.raises(SurgeryError, match="leaves the folder"):
        cut(source, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_links_of_the_hub_cache_are_followed(source: Path, tmp_path: Path) -> None:
    (source / "tokenizer.json").write_text("x")
    snapshot = tmp_path / "hub" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    source.rename(tmp_path / "hub" / "blobs")
    for file in (tmp_path / "hub" / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    cut(snapshot, tmp_path / "cut")
    copy = tmp_path / "cut" / "tokenizer.json"
    assert copy.read_text() == "x"
    assert not copy.is_symlink()


def test_tied_head_stays_tied(source: Path, tmp_path: Path) -> None:
    cut(source, tmp_path / "cut")
    assert "lm_head.weight" not in Checkpoint.open(tmp_path / "cut").tensors
    assert ModelView.open(tmp_path / "cut").tied


def test_tensors_that_stay_are_equal_bit_for_bit(source: Path, tmp_path: Path) -> None:
    cut(source, tmp_path / "cut")
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "cut")
    for name in after.tensors:
        old = name.replace("layers.1.", "layers.2.") if "layers.1." in name else name.replace("layers.2.", "layers.3.")
        assert torch.equal(after.read(name), before.read(old))


def test_interruption_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    before = {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(sidecar.shutil, "copyfile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cut(source, tmp_path / "cut")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_disk_that_fills_up_at_the_end_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sidecar.shutil, "copyfile", full)
    with pytest.raises(SurgeryError, match="disk is full"):
        cut(source, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_plan_for_another_model_is_refused(source: Path, tmp_path: Path) -> None:
    other = ModelView.open(write_tiny("llama", tmp_path / "other", num_hidden_layers=5))
    with pytest.raises(PlanError):
        engine.apply(ModelView.open(source), Plan.make(other, BLOCK_1), tmp_path)


@pytest.mark.parametrize(
    "pairs",
    [((0, 0), (2, 2)), ((0, 0), (3, 3), (2, 2)), ((0, 0), (2, 2), (3, 3), (1, 1))],
    ids=["less", "order", "more"],
)
def test_layout_that_does_not_fit_the_plan_is_refused(
    source: Path, tmp_path: Path, pairs: tuple[tuple[int, int], ...]
) -> None:
    view = ModelView.open(source)
    (tmp_path / "cut").mkdir()
    with pytest.raises(SurgeryError, match="does not fit"):
        engine.apply(view, Plan.make(view, BLOCK_1), tmp_path / "cut", layout=Layout("stock", pairs))
    assert list((tmp_path / "cut").iterdir()) == []


def test_weights_that_changed_after_opening_are_refused(source: Path, tmp_path: Path) -> None:
    view = ModelView.open(source)
    os.truncate(source / "model.safetensors", 5000)
    with pytest.raises(CheckpointError, match="ends too early"), atomic_folder(tmp_path / "cut") as folder:
        engine.apply(view, Plan.make(view, BLOCK_1), folder)
    assert not (tmp_path / "cut").exists()


def test_dropping_blocks_needs_no_torch(source: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from prunekit.structure.view import ModelView;"
        "from prunekit.plan.plan import Plan; from prunekit.surgery import engine;"
        f"view = ModelView.open(Path({str(source)!r}));"
        f"engine.apply(view, Plan.make(view, {BLOCK_1!r}), Path({str(tmp_path)!r}));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(engine.__file__).parents[2]).returncode == 0
