"""Traces a loaded model into a tidy ONNX graph: sample inputs, the exporter without its chatter, plain names."""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch

from prunekit.core.errors import ExportError
from prunekit.modeling.kv_cache import cache_argument
from prunekit.modeling.load import load_model
from prunekit.modeling.quiet import quiet
from prunekit.runtime.attention.masked import mask_by_pattern

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir
    from transformers import PreTrainedModel

BATCH, LENGTH, PAST = "batch_size", "sequence_length", "past_sequence_length"
TOTAL = f"{PAST} + {LENGTH}"
# The tracer names the cache as transformers does: `cache` from 5.24 on, `past_key_values` before.
_CACHE_INPUT = re.compile(r"(?:input\.)?(?:cache|past_key_values)\.layers\.(\d+)\.(key|value)s")
_CACHE_OUTPUT = re.compile(r"(?:output\.)?(?:cache|past_key_values)\.layers\.(\d+)\.(key|value)s")


def load_for_graph(folder: Path) -> PreTrainedModel:
    """Model of a checkpoint folder in float32, under the pattern of its configuration as a mask where it has one.

    Raises:
        CheckpointError: as `load_model`.
        RuntimePolicyError: for a pattern that no mask can stand for.
    """
    model = load_model(folder)
    mask_by_pattern(model)
    return model


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether a model continues text, so that its graph gets a KV cache."""
    return bool(model.can_generate())


def has_encoder(model: PreTrainedModel) -> bool:
    """Whether a model is a decoder that reads what an encoder of its own gives."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def sample_inputs(model: PreTrainedModel, batch: int, length: int, pad: int = 0, seed: int = 0) -> dict[str, Any]:
    """Seeded inputs of a model.

    Decoders are padded on the left, encoders on the right, where `pad` > 0: a mask of ones alone would let the
    tracer drop it from the graph. A decoder that reads an encoder gets two tokens fewer than that.

    Args:
        batch: rows, at least 2 for a trace: a traced axis of length 1 stays 1.
        length: tokens a row; images ignore it.
        pad: padded positions of the first row.
        seed: of the random ids or pixels.

    Returns:
        `input_ids`, `attention_mask`, for some `token_type_ids`, int64 [batch, length]; or `pixel_values`, float
        [batch, channels, height, width], of videos [batch, frames, channels, height, width]; or `input_features`, float
        [batch, bands, frames]. Where there is an encoder and a decoder, `decoder_input_ids` too.
    """
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        size = model.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        frames = getattr(model.config, "num_frames", None)
        shape = (batch, *([] if frames is None else [frames]), model.config.num_channels, height, width)
        return {"pixel_values": torch.randn(shape, generator=generator).to(model.dtype)}
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(min(3, words - 1), words, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad:
        left = is_decoder(model) and not has_encoder(model)
        mask[0, slice(0, pad) if left else slice(length - pad, length)] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if has_encoder(model):
        written = {"decoder_input_ids": ids[:, : max(1, length - 2)].flip(0)}
        if model.main_input_name != "input_features":
            return {**inputs, **written}
        shape = (batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
        return {"input_features": torch.randn(shape, generator=generator).to(model.dtype), **written}
    takes = inspect.signature(model.forward).parameters
    if "token_type_ids" in takes and getattr(model.config, "type_vocab_size", None):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def trace(model: PreTrainedModel, opset: int | None = None, plain_heads: bool = False) -> onnx_ir.Model:
    """ONNX graph of a model, batch and lengths dynamic.

    A decoder becomes one graph that prefills from an empty cache, decodes a token and continues with several:
    `past_key_values.<n>.key|value` in, `present.<n>.key|value` out, n counting the attention layers that are left.

    Args:
        plain_heads: write the numbers of KV heads as numbers also where layers differ in them.

    Raises:
        ExportError: if the model cannot be traced, or its graph lost an input.
    """
    from transformers.exporters import OnnxConfig, OnnxExporter

    if has_encoder(model):
        why = "models with an encoder and a decoder are not exported"
        raise ExportError(f"`{type(model).__name__}` cannot be written as ONNX", why=why)
    parts: dict[str, Any] = {}
    try:
        with _quiet(), torch.no_grad():
            config = OnnxConfig(dynamic=True, opset_version=opset)
            if is_decoder(model):
                target, parts = _decode_step(model)
            else:
                target, parts = model, sample_inputs(model, batch=2, length=8, pad=3)
                if "use_cache" in inspect.signature(model.forward).parameters:
                    parts["use_cache"] = False
                if "pixel_values" in parts:
                    config.dynamic_shapes = {"pixel_values": {0: torch.export.Dim.AUTO}}
            exported = OnnxExporter().export(target, parts, config)
    except Exception as error:
        raise ExportError(
            f"`{type(model).__name__}` could not be exported to ONNX",
            why=_first_line(error),
            hint="the checkpoint itself is not affected; leave `onnx` out of `export.formats` to do without",
        ) from error
    # transformers before 5.23 returns torch's ONNXProgram, which keeps the graph as `model`.
    ir = exported.program if hasattr(exported, "program") else exported.model
    _rename(ir)
    _name_axes(ir, plain_heads)
    _strip(ir)
    _require_inputs(ir, [name for name, value in parts.items() if isinstance(value, torch.Tensor)], is_decoder(model))
    return ir


def _decode_step(model: PreTrainedModel) -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import DynamicCache, GenerationConfig
    from transformers.exporters.utils import decompose_for_generation

    inputs = sample_inputs(model, batch=2, length=7, pad=3)
    # A cache made without the config keeps every token in every layer; a sliding layer's window then comes from its
    # mask. A layer that drops old tokens would bake the sample's length into the graph.
    inputs[cache_argument(model)] = DynamicCache()
    greedy = GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    step = decompose_for_generation(model, inputs, generation_config=greedy, multi_token_decode=True)
    return step["decode"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what transformers says, and the prints of the exporter."""
    with quiet(), redirect_stdout(io.StringIO()):
        yield


def _first_line(error: BaseException) -> str:
    """Innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def _rename(ir: onnx_ir.Model) -> None:
    """Gives the cache the names that optimum, transformers.js and onnxruntime-genai look for."""
    for values, pattern, prefix in (
        (ir.graph.inputs, _CACHE_INPUT, "past_key_values"),
        (ir.graph.outputs, _CACHE_OUTPUT, "present"),
    ):
        found = [(value, match) for value in values if (match := pattern.fullmatch(value.name or ""))]
        order = {layer: rank for rank, layer in enumerate(sorted({int(match[1]) for _, match in found}))}
        for value, match in found:
            value.name = f"{prefix}.{order[int(match[1])]}.{match[2]}"


def _name_axes(ir: onnx_ir.Model, plain_heads: bool) -> None:
    """Replaces the tracer's symbols (`s44`) by what the axes are; numbers written as symbols become numbers.

    The KV head axis stays symbolic where layers differ in it, unless `plain_heads`: runtimes that feed one shape of
    empty cache to every layer can then still open the graph, since an empty tensor adds nothing.
    """
    import onnx_ir

    names: dict[str, str] = {}
    for value in ir.graph.inputs:
        roles: Sequence[str | None] = (BATCH, LENGTH)
        if (value.name or "").startswith("past_key_values."):
            roles = (BATCH, None, PAST, None)
        elif value.name == "attention_mask" and any((v.name or "").startswith("past_") for v in ir.graph.inputs):
            roles = (BATCH, TOTAL)
        for axis, role in zip(value.shape or (), roles, strict=False):
            text = _symbol(axis)
            if role and text and text.isidentifier():
                names.setdefault(text, role)
    kv_heads = {str(v.shape[1]) for v in ir.graph.inputs if (v.name or "").startswith("past_") and v.shape}
    uneven = len(kv_heads) > 1 and not plain_heads
    for value in _values(ir):
        if value.shape is None:
            continue
        cache = uneven and (value.name or "").startswith(("past_key_values.", "present."))
        axes: list[Any] = []
        for position, axis in enumerate(value.shape):
            text = str(axis) if isinstance(axis, int) else _symbol(axis)
            if text is None:
                axes.append(axis)
            elif text.isdigit():
                axes.append(onnx_ir.SymbolicDim(f"kv_heads_{text}") if cache and position == 1 else int(text))
            else:
                axes.append(onnx_ir.SymbolicDim(re.sub(r"\bs\d+\b", lambda m: names.get(m[0], m[0]), text)))
        value.shape = onnx_ir.Shape(axes)


def _symbol(axis: Any) -> str | None:
    """Text of a symbolic axis, None for a plain number or an unknown."""
    return None if isinstance(axis, int) or axis.value is None else str(axis.value)


def _values(ir: onnx_ir.Model) -> Iterator[onnx_ir.Value]:
    from onnx_ir.traversal import RecursiveGraphIterator

    yield from ir.graph.inputs
    for node in RecursiveGraphIterator(ir.graph):
        yield from node.outputs


def _strip(ir: onnx_ir.Model) -> None:
    """Drops the tracer's notes (stack traces, source paths), which are most of a graph file's bytes."""
    from onnx_ir.traversal import RecursiveGraphIterator

    for value in [*_values(ir), *ir.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    for node in RecursiveGraphIterator(ir.graph):
        node.metadata_props.clear()
        node.doc_string = None
    ir.graph.metadata_props.clear()
    ir.metadata_props.clear()
    ir.graph.doc_string = ir.doc_string = None


def _require_inputs(ir: onnx_ir.Model, given: Sequence[str], decoder: bool) -> None:
    names = {value.name for value in ir.graph.inputs}
    missing = sorted(set(given) - names)
    if decoder and not any((name or "").startswith("past_key_values.") for name in names):
        missing.append("past_key_values")
    if missing:
        raise ExportError(
            "the ONNX graph lost inputs: " + ", ".join(f"`{name}`" for name in missing),
            why="a graph without them gives wrong results for padded or continued text",
            hint="report this with the versions of torch and transformers",
        )
