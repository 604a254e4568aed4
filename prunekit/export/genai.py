"""Writes a decoder as ONNX with the `genai_config.json` that onnxruntime-genai opens a folder by."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import ExportError
from prunekit.core.files import atomic_folder, write_json
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.export.onnx import OnnxReport, export_onnx, require_packages
from prunekit.structure.view import ModelView

if TYPE_CHECKING:
    from collections.abc import Mapping

    from prunekit.plan.plan import Plan

CONFIG = "genai_config.json"
_PAST, _PRESENT = "past_key_values.%d", "present.%d"
# Its names for decoders with a cache of keys and values in tensors of their own. A model of another name is opened as
# `llama`: the name chooses the kind of cache and inputs, which are the same for all of them, and no computation.
_TYPES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "smollm3")


@dataclass(frozen=True)
class GenaiReport:
    """What an export wrote.

    Args:
        onnx: of the graph.
        type: of the model, in the words of onnxruntime-genai.
        kv_heads: of each layer with a cache.
    """

    onnx: OnnxReport
    type: str
    kv_heads: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.onnx.to_json(), "type": self.type, "kv_heads": list(self.kv_heads)}


def require_decoder(view: ModelView, plan: Plan | None = None) -> None:
    """Makes sure that a model, or what a plan leaves of it, writes text and keeps a cache.

    Raises:
        ExportError: naming what it lacks.
    """
    if not view.arch.decoder or view.section or view.arch.stacks:
        why = "onnxruntime-genai writes text"
        raise ExportError(
            f"`{view.model_type}` is no decoder of text", why=why, hint="" if view.arch.stacks else "use `onnx`"
        )
    dropped = () if plan is None else plan.drop
    if all(sublayer.kind != "attention" or sublayer.address in dropped for sublayer in view.sublayers):
        raise ExportError("the model has no attention left", why="onnxruntime-genai counts tokens by the KV cache")


def export_genai(model_folder: Path, out_folder: Path, progress: Progress = NULL_PROGRESS) -> GenaiReport:
    """Writes an ONNX folder that onnxruntime-genai opens.

    Args:
        model_folder: checkpoint folder, stock or heterogeneous.
        out_folder: folder to write; it may exist if it is empty.
        progress: told of each stage.
    Raises:
        ExportError: if the model is no decoder, or as `export_onnx`. Nothing is left behind then.
    """
    require_packages()
    view = ModelView.open(model_folder)
    require_decoder(view)
    ids = _special_ids(view)
    with atomic_folder(out_folder, overwrite=out_folder.exists()) as unfinished:
        report = export_onnx(model_folder, unfinished, progress, plain_heads=True)
        caches = _caches(unfinished / "model.onnx")
        config = genai_config(view, ids, caches, report.inputs)
        write_json(unfinished / CONFIG, config)
    return GenaiReport(report, config["model"]["type"], tuple(heads for heads, _ in caches))


def genai_config(
    view: ModelView, ids: Mapping[str, Any], caches: list[tuple[int, int]], inputs: tuple[str, ...]
) -> dict[str, Any]:
    """Content of `genai_config.json`.

    Args:
        view: the model.
        ids: of the first, the last and the padding token.
        caches: KV heads and head width of each layer with a cache, in order; the runtime reads those of every layer
            from the graph, and takes the first where the file names one number.
        inputs: names of the graph's inputs.
    """
    text = view.text
    context = int(text.get("max_position_embeddings") or text.get("n_positions") or 2048)
    given = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    return {
        "model": {
            **ids,
            "context_length": context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "head_size": caches[0][1],
                "hidden_size": view.hidden,
                "inputs": {**given, "past_key_names": f"{_PAST}.key", "past_value_names": f"{_PAST}.value"},
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{_PRESENT}.key",
                    "present_value_names": f"{_PRESENT}.value",
                },
                "num_attention_heads": int(text[view.arch.key("heads", text)]),
                "num_hidden_layers": len(caches),
                "num_key_value_heads": caches[0][0],
            },
            "type": view.model_type if view.model_type in _TYPES else "llama",
            "vocab_size": int(text["vocab_size"]),
        },
        "search": {
            "do_sample": False,
            "max_length": context,
            "num_beams": 1,
            "num_return_sequences": 1,
            # The graph hands out a longer cache with every step, in memory of its own.
            "past_present_share_buffer": False,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def _special_ids(view: ModelView) -> dict[str, Any]:
    """First, last and padding token, as generation takes them; padding is the last token where nothing is said.

    Raises:
        ExportError: if no token ends a text, or one that the vocabulary does not have: the runtime would write past it.
    """
    file = view.checkpoint.folder / "generation_config.json"
    said: Mapping[str, Any] = json.loads(file.read_text("utf-8")) if file.is_file() else {}

    def found(name: str) -> Any:
        value = said.get(name)
        return view.text.get(name) if value is None else value

    end, words = found("eos_token_id"), int(view.text["vocab_size"])
    ends = end if isinstance(end, list) else [end]
    if not all(isinstance(token, int) and 0 <= token < words for token in ends) or not ends:
        raise ExportError(
            f"`eos_token_id: {end}` is no token of the model",
            why=f"{CONFIG} needs the token that ends a text, and there are {words}",
            hint="set `eos_token_id` in config.json or generation_config.json",
        )
    last = ends[0]
    first, padding = found("bos_token_id"), found("pad_token_id")
    return {
        "bos_token_id": last if first is None else first,
        "eos_token_id": end,
        "pad_token_id": last if padding is None else padding,
    }


def _caches(graph: Path) -> list[tuple[int, int]]:
    """KV heads and head width of each layer with a cache, from the inputs of a graph."""
    import onnx

    inputs = {value.name: value for value in onnx.load(str(graph), load_external_data=False).graph.input}
    found: list[tuple[int, int]] = []
    while f"{_PAST % len(found)}.key" in inputs:
        axes = inputs[f"{_PAST % len(found)}.key"].type.tensor_type.shape.dim
        found.append((int(axes[1].dim_value), int(axes[3].dim_value)))
    return found
