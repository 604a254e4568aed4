"""Writes a checkpoint folder as ONNX: the graph, its weights, configuration and tokenizer."""

from __future__ import annotations

import gc
import importlib.util
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import ExportError
from prunekit.core.files import atomic_folder
from prunekit.core.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    import onnx_ir

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class OnnxReport:
    """What an export wrote.

    Args:
        kind: `decoder` (one graph with KV cache) or `encoder`.
        opset: ONNX operator set.
        inputs: input names of the graph.
        outputs: output names of the graph.
        cached_layers: attention layers with a cache; 0 for encoders.
        file_bytes: of the graph and its weights.
        max_abs_diff: largest difference between ONNX Runtime and torch on a padded random batch of another shape than
            the traced one, logits or hidden states.
        providers: execution providers of ONNX Runtime in that comparison.
        seconds: of the whole export.
    """

    kind: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cached_layers: int
    file_bytes: int
    max_abs_diff: float
    providers: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        plain = asdict(self)
        return plain | {name: list(plain[name]) for name in ("inputs", "outputs", "providers")}


def export_onnx(
    model_folder: Path,
    out_folder: Path,
    progress: Progress = NULL_PROGRESS,
    *,
    opset: int | None = None,
    plain_heads: bool = False,
) -> OnnxReport:
    """Writes a checkpoint as ONNX and compares it with torch before the folder appears.

    A static pattern in the configuration goes along as a mask. Weights are float32 whatever the checkpoint holds: ONNX
    Runtime's CPU provider has no bfloat16 arithmetic.

    Args:
        model_folder: checkpoint folder, stock or heterogeneous.
        out_folder: folder to write; it may exist if it is empty.
        progress: told of each stage.
        opset: ONNX operator set; the exporter's default if None.
        plain_heads: write the numbers of KV heads as numbers also where layers differ in them, as onnxruntime-genai
            reads them.

    Raises:
        ExportError: if a package is missing, the folder is in use, the model cannot be traced, or ONNX Runtime
            computes something else than torch. Nothing is left behind then.
        RuntimePolicyError: for a pattern that chooses by score.
    """
    require_packages()
    if out_folder.exists() and (not out_folder.is_dir() or any(out_folder.iterdir())):
        raise ExportError(f"`{out_folder}` exists and is not empty", hint="give another folder or remove it")
    from prunekit.export import ort
    from prunekit.export._sidecar import write_sidecar
    from prunekit.export._trace import is_decoder, load_for_graph, sample_inputs, trace

    start = time.perf_counter()
    with progress.task("exporting to ONNX", total=4, unit="stages") as task:
        model = load_for_graph(model_folder)
        task.advance(1)
        graph = trace(model, opset, plain_heads)
        names = [[value.name or "" for value in values] for values in (graph.graph.inputs, graph.graph.outputs)]
        version = graph.opset_imports[""]
        task.advance(1)
        with atomic_folder(out_folder, overwrite=out_folder.exists()) as unfinished:
            _save(graph, unfinished)
            del graph
            gc.collect()
            write_sidecar(model_folder, unfinished)
            task.advance(1)
            inputs = sample_inputs(model, batch=3, length=11, pad=4, seed=1)
            parity = ort.compare_loaded(model, inputs, unfinished, new_tokens=4)
            if not parity.ok:
                raise ExportError(
                    f"the ONNX graph differs from torch by {parity.max_abs_diff:.3g}",
                    why=f"{parity.tolerance:.3g} is the most that counts as float32 noise",
                    hint="report this with the versions of torch, transformers and onnxruntime",
                )
            task.advance(1)
    return OnnxReport(
        kind="decoder" if is_decoder(model) else "encoder",
        opset=version,
        inputs=tuple(names[0]),
        outputs=tuple(names[1]),
        cached_layers=sum(name.startswith("past_key_values.") for name in names[0]) // 2,
        file_bytes=parity.file_bytes,
        max_abs_diff=parity.max_abs_diff,
        providers=parity.providers,
        seconds=time.perf_counter() - start,
    )


def require_packages() -> None:
    """Checks that what an export needs is installed.

    Raises:
        ExportError: with the extra to install.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            "ONNX export needs " + ", ".join(f"`{name}`" for name in missing),
            hint='pip install "prunekit[onnx]", or "prunekit[onnx-gpu]" for CUDA',
        )
    try:
        found = importlib.util.find_spec("transformers.exporters")
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise ExportError("ONNX export needs `transformers.exporters`", hint='pip install "transformers>=5.17"')


def _save(graph: onnx_ir.Model, folder: Path) -> None:
    """Writes graph and weights, and checks that every weight is where the graph says."""
    import onnx_ir

    from prunekit.export._external import external_files
    from prunekit.export.ort import GRAPH

    # Apart from the graph always: a graph file over 2 GB cannot be read back.
    onnx_ir.save(graph, folder / GRAPH, external_data=f"{GRAPH}.data")
    external_files(folder / GRAPH)
