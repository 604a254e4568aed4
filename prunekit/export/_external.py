"""Where an ONNX graph keeps its weights: plain files beside it and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import ExportError

if TYPE_CHECKING:
    import onnx


def external_files(graph: Path) -> tuple[Path, ...]:
    """Weight files an ONNX graph names, each checked to lie beside it and to be long enough.

    Raises:
        ExportError: if the graph cannot be read, or a weight lies outside the folder, in a link, or past a file's end.
    """
    import onnx
    from onnx.external_data_helper import uses_external_data

    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as error:
        raise ExportError(f"`{graph}` is not a readable ONNX file", why=str(error).splitlines()[0]) from error
    found: dict[str, Path] = {}
    for tensor in _tensors(model):
        if not uses_external_data(tensor):
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        name = entry.get("location", "")
        file = graph.parent / name
        if not name or Path(name).name != name or name in (".", "..") or file.is_symlink() or not file.is_file():
            raise ExportError(
                f"`{graph.name}` keeps weight `{tensor.name}` in `{name}`",
                why="weights must lie in a plain file beside the graph",
                hint="export again",
            )
        try:
            end = int(entry.get("offset", "0")) + int(entry.get("length", "0"))
        except ValueError as error:
            raise ExportError(f"`{graph.name}` gives no number for where weight `{tensor.name}` lies") from error
        if end > file.stat().st_size or int(entry.get("offset", "0")) < 0 or int(entry.get("length", "0")) < 0:
            raise ExportError(f"weight `{tensor.name}` lies outside `{name}`", hint="export again")
        found[name] = file
    return tuple(found[name] for name in sorted(found))


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a model: weights, and attributes of nodes in sub-graphs and functions."""
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        scope = pending.pop()
        yield from getattr(scope, "initializer", ())
        for sparse in getattr(scope, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in scope.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                pending += [attribute.g] if attribute.HasField("g") else []
                pending += attribute.graphs
