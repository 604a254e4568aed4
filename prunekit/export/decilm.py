"""Writes a Llama-shaped checkpoint whose blocks differ as DeciLM: `block_configs`, which vLLM and TensorRT-LLM read."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import prunekit.modeling
from prunekit.checkpoint.writer import OutTensor, Stored, disk_errors, write_weights
from prunekit.core.errors import PlanError
from prunekit.core.files import atomic_folder, write_json
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.plan.layer_formats import block_configs, decilm_notes, require_decilm
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery.config import set_older_rope_keys, stock_base
from prunekit.surgery.sidecar import model_files, write_model_files

CLASS, MODEL_TYPE = "DeciLMForCausalLM", "nemotron-nas"
FILES = ("configuration_decilm.py", "modeling_decilm.py")


@dataclass(frozen=True)
class DeciReport:
    """What an export wrote.

    Args:
        blocks: entries of `block_configs`.
        without_attention: of them.
        without_ffn: of them.
        loads: what readers make of the folder, by their names; read in their sources, not run.
        file_bytes: of the weights.
        seconds: of the whole export.
    """

    blocks: int
    without_attention: int
    without_ffn: int
    loads: dict[str, str]
    file_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def export_decilm(
    model_folder: Path,
    out_folder: Path,
    progress: Progress = NULL_PROGRESS,
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> DeciReport:
    """Writes a checkpoint as DeciLM; weights are copied from file to file.

    Args:
        model_folder: checkpoint folder of `llama` or `mistral`, stock or heterogeneous.
        out_folder: folder to write; it may exist if it is empty.
        progress: told of bytes.
        max_shard_bytes: largest weight file.
    Raises:
        PlanError: if `block_configs` cannot say the model; before anything is written.
    """
    start = time.perf_counter()
    view = ModelView.open(model_folder)
    plan = Plan.make(view)
    entries = decilm_entries(view, plan)
    others = model_files(model_folder)
    with atomic_folder(out_folder, overwrite=out_folder.exists()) as unfinished:
        names = write_weights(unfinished, list(_tensors(view)), max_shard_bytes, progress)
        with disk_errors(unfinished):
            write_json(unfinished / "config.json", decilm_config(view, entries))
            write_model_files(model_folder, others, unfinished)
            for name in FILES:
                shutil.copyfile(Path(prunekit.modeling.__path__[0]) / name, unfinished / name)
        size = sum((unfinished / name).stat().st_size for name in names)
    return DeciReport(
        blocks=len(entries),
        without_attention=sum(entry["attention"]["no_op"] for entry in entries),
        without_ffn=sum(entry["ffn"]["no_op"] for entry in entries),
        loads={name: text for name, text in decilm_notes(view, plan).items() if name != "llama.cpp"},
        file_bytes=size,
        seconds=time.perf_counter() - start,
    )


def decilm_entries(view: ModelView, plan: Plan | None) -> list[dict[str, Any]]:
    """`block_configs` of what a plan leaves; none, after a look at the family, without a plan.

    Raises:
        PlanError: naming the rule that the family or the plan breaks.
    """
    try:
        view.require_plain("DeciLM")
        require_decilm(view)
        found: list[dict[str, Any]] = [] if plan is None else block_configs(view, plan)["block_configs"]
    except PlanError as error:
        hint = "leave `deci` out; `multiple_of: 256` keeps FFNs at widths that it can say"
        raise PlanError(f"this `{view.model_type}` cannot be DeciLM", why=error.what, hint=hint) from error
    return found


def decilm_config(view: ModelView, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """`config.json` of a DeciLM folder: Llama's, with an entry a block in place of other lists of that length."""
    config = {key: value for key, value in stock_base(view).items() if key not in view.arch.lists}
    for key in ("prunekit", "sliding_window", "use_sliding_window", "max_window_layers"):
        config.pop(key, None)
    set_older_rope_keys(config)
    return {
        **config,
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "auto_map": {
            "AutoConfig": f"{FILES[0].removesuffix('.py')}.DeciLMConfig",
            "AutoModelForCausalLM": f"{FILES[1].removesuffix('.py')}.{CLASS}",
        },
        "block_configs": entries,
    }


def _tensors(view: ModelView) -> Iterator[OutTensor]:
    refs = [*view.outer, *(ref for sublayer in view.sublayers for ref in sublayer.tensors)]
    for ref in refs:
        info = view.checkpoint.tensors[ref.name]
        yield OutTensor(ref.name, ref.dtype, ref.shape, Stored(view.checkpoint.folder / info.file, info.start))
