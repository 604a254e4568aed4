"""Writes a checkpoint folder as one GGUF file for llama.cpp, with a tensor in memory at a time."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from prunekit.core.errors import ExportError
from prunekit.core.files import atomic_folder
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.plan.gguf_rules import GgufLayout, gguf_layout, rope_of
from prunekit.plan.plan import Plan
from prunekit.structure.parts import SubLayer
from prunekit.structure.view import ModelView

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from torch import Tensor

    from prunekit.export._gguf_vocab import Vocabulary

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
GGUF_TYPES = get_args(GgufType)
# What matrices are stored in where the checkpoint holds them in these types.
_AUTO = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
_FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_Q8_BLOCK = 32
# Neurons of an FFN of zeros: the smallest that every type stores.
_PAD_NEURONS = 32


@dataclass(frozen=True)
class GgufReport:
    """What an export wrote.

    Args:
        file: its name.
        architecture: of llama.cpp.
        type: of matrices; norms and biases are float32.
        blocks: in the file.
        tensors: in the file.
        fallbacks: matrices whose rows are no multiple of 32, stored as f16 instead of q8_0.
        padding: sub-layers of zeros that the architecture needs and that add nothing.
        pre_tokenizer: llama.cpp's name of it.
        file_bytes: size.
        seconds: of the whole export.
    """

    file: str
    architecture: str
    type: str
    blocks: int
    tensors: int
    fallbacks: int
    padding: tuple[str, ...]
    pre_tokenizer: str
    file_bytes: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"padding": list(self.padding)}


@dataclass(frozen=True)
class _Out:
    """A tensor of the file: the stored one that it is made of, None for zeros, and how."""

    name: str
    shape: tuple[int, ...]
    source: str | None
    heads: int = 0
    transpose: bool = False


def require_gguf(view: ModelView) -> Vocabulary:
    """Checks that the package is installed and the tokenizer can be said; returns that.

    Raises:
        ExportError: with the extra to install, or what the tokenizer does.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("GGUF files need the package `gguf`", hint='pip install "prunekit[gguf]"')
    from prunekit.export._gguf_vocab import read_vocabulary

    table = next(ref for ref in view.outer if re.fullmatch(view.arch.table, ref.name))
    return read_vocabulary(view.checkpoint.folder, table.shape[0])


def export_gguf(
    model_folder: Path, out_folder: Path, progress: Progress = NULL_PROGRESS, *, type: GgufType = "auto"
) -> GgufReport:
    """Writes `model-<type>.gguf`.

    Args:
        model_folder: checkpoint folder, stock or heterogeneous.
        out_folder: folder to write; it may exist if it is empty.
        progress: told of bytes.
        type: of matrices; `auto` is what the checkpoint holds them in.
    Raises:
        PlanError: if llama.cpp has no graph that computes the model; before a weight is read.
        ExportError: if the package is missing, the folder in use, or the tokenizer cannot be said. Nothing is left
            behind then.
    """
    start = time.perf_counter()
    view = ModelView.open(model_folder)
    layout = gguf_layout(view, Plan.make(view))
    vocabulary = require_gguf(view)
    if type == "auto":
        stored = max(view.sublayers[0].tensors, key=lambda ref: len(ref.shape)).dtype
        type = _AUTO.get(stored, "")  # type: ignore[assignment]
    if type not in _FILE_TYPES:
        raise ExportError(
            f"matrices of type `{stored}` are not written", hint=f"choose one of {', '.join(_FILE_TYPES)}"
        )
    with atomic_folder(out_folder, overwrite=out_folder.exists()) as unfinished:
        file = unfinished / f"model-{type}.gguf"
        outs = list(_outs(view, layout))
        fallbacks = _write(file, view, layout, vocabulary, outs, type, progress)
        size = file.stat().st_size
    return GgufReport(
        file=file.name,
        architecture=layout.graph.name,
        type=type,
        blocks=len(layout.pairs),
        tensors=len(outs),
        fallbacks=fallbacks,
        padding=layout.padding,
        pre_tokenizer=vocabulary.pre,
        file_bytes=size,
        seconds=time.perf_counter() - start,
    )


def _outs(view: ModelView, layout: GgufLayout) -> Iterator[_Out]:
    """Every tensor of the file, in its order."""
    import gguf

    numbers = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[layout.graph.name], len(layout.pairs))

    def named(name: str) -> str:
        # A base model's tensors lack the prefix that the map knows.
        found = (names.get_name(text, try_suffixes=(".weight", ".bias")) for text in (name, f"model.{name}"))
        gguf_name = next((text for text in found if text), None)
        if gguf_name is None:
            raise ExportError(f"llama.cpp has no place for the tensor `{name}`", hint="report this with the model")
        return gguf_name

    for ref in view.outer:
        yield _Out(named(ref.name), ref.shape, ref.name)
    for number, pair in enumerate(layout.pairs):
        for kind, block in zip(("attention", "ffn"), pair, strict=True):
            address = f"blocks.{number}.{kind}"
            if block is not None:
                yield from _stored(view, layout, view.sublayer(f"blocks.{block}.{kind}"), number, named)
            elif address in layout.padding:
                yield from _zeros(view, number, kind)


def _stored(view: ModelView, layout: GgufLayout, sublayer: SubLayer, number: int, named: Any) -> Iterator[_Out]:
    heads = {
        "q_proj": sublayer.widths.get("kv", 0) * sublayer.widths.get("rep", 0),
        "k_proj": sublayer.widths.get("kv", 0),
    }
    for ref in sublayer.tensors:
        part = ref.name.split(".")[-2]
        # GPT-2 stores its matrices [in, out].
        transpose = view.model_type == "gpt2" and len(ref.shape) == 2
        yield _Out(
            named(view.arch.renumbered(ref.name, number)),
            ref.shape[::-1] if transpose else ref.shape,
            ref.name,
            heads.get(part, 0) if layout.graph.pairs else 0,
            transpose,
        )


def _zeros(view: ModelView, number: int, kind: str) -> Iterator[_Out]:
    """A sub-layer that adds nothing: one head, or a few neurons."""
    attention = kind == "attention"
    width = view.widths["attention"]["hd"] if attention else _PAD_NEURONS
    into, out = (("attn_q", "attn_k", "attn_v"), "attn_output") if attention else (("ffn_gate", "ffn_up"), "ffn_down")
    yield _Out(f"blk.{number}.{'attn' if attention else 'ffn'}_norm.weight", (view.hidden,), None)
    for name in into:
        yield _Out(f"blk.{number}.{name}.weight", (width, view.hidden), None)
    yield _Out(f"blk.{number}.{out}.weight", (view.hidden, width), None)


def _write(
    file: Path,
    view: ModelView,
    layout: GgufLayout,
    vocabulary: Vocabulary,
    outs: list[_Out],
    type: str,
    progress: Progress,
) -> int:
    """Writes the file and returns how many matrices are in another type than asked for."""
    import gguf
    import numpy as np

    from prunekit.export._gguf_vocab import write_vocabulary

    writer = gguf.GGUFWriter(None, layout.graph.name)
    _write_metadata(writer, view, layout, type)
    write_vocabulary(writer, vocabulary)
    factors = _rope_factors(view)
    types = [_type_of(out, type) for out in outs]
    for out, stored in zip(outs, types, strict=True):
        count = int(np.prod(out.shape))
        block, size = gguf.GGML_QUANT_SIZES[stored]
        writer.add_tensor_info(out.name, out.shape, np.dtype(np.float32), count // block * size, raw_dtype=stored)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    try:
        writer.write_header_to_file(file)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.task("writing", total=float(sum(np.prod(out.shape) for out in outs)), unit="weights") as task:
            for out, stored in zip(outs, types, strict=True):
                with np.errstate(over="ignore"):
                    data = gguf.quants.quantize(_values(view, out), stored)
                if stored == gguf.GGMLQuantizationType.F16 and not np.isfinite(data).all():
                    what = f"`{out.source}` holds values that float16 cannot"
                    raise ExportError(what, hint="choose another type, such as bf16 or f32")
                writer.write_tensor_data(data)
                task.advance(float(np.prod(out.shape)))
            if factors is not None:
                writer.write_tensor_data(factors)
    finally:
        writer.close()
    wanted = gguf.GGMLQuantizationType[type.upper()]
    return sum(stored != wanted for out, stored in zip(outs, types, strict=True) if _is_matrix(out))


def _is_matrix(out: _Out) -> bool:
    # Position embeddings are added to float32 sums, and small.
    return len(out.shape) == 2 and not out.name.startswith("position_embd")


def _type_of(out: _Out, type: str) -> gguf.GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    if not _is_matrix(out):
        return GGMLQuantizationType.F32
    if type == "q8_0" and out.shape[-1] % _Q8_BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[type.upper()]


def _values(view: ModelView, out: _Out) -> np.ndarray[Any, Any]:
    """A tensor's values as float32, in the order of llama.cpp."""
    import numpy as np

    if out.source is None:
        return np.zeros(out.shape, np.float32)
    tensor = view.checkpoint.read(out.source).float()
    if out.transpose:
        tensor = tensor.T
    if out.heads:
        tensor = _neighbours(tensor, out.heads)
    return np.ascontiguousarray(tensor.numpy())


def _neighbours(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys so that the two numbers that turn together lie side by side.

    transformers turns number i of a head with number i + width / 2. Two heads of four rows, `0 1 2 3 4 5 6 7`, become
    `0 2 1 3 4 6 5 7`.
    """
    halves = tensor.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2)


def _write_metadata(writer: gguf.GGUFWriter, view: ModelView, layout: GgufLayout, type: str) -> None:
    import gguf

    text = _with_defaults(view)
    widths = [
        tuple(
            None if block is None else view.sublayer(f"blocks.{block}.{kind}").widths
            for kind, block in zip(("attention", "ffn"), pair, strict=True)
        )
        for pair in layout.pairs
    ]
    padded = set(layout.padding)
    heads = [a["kv"] * a["rep"] if a else int(f"blocks.{i}.attention" in padded) for i, (a, _) in enumerate(widths)]
    kv = [a["kv"] if a else int(f"blocks.{i}.attention" in padded) for i, (a, _) in enumerate(widths)]
    neurons = [f["ffn"] if f else _PAD_NEURONS * (f"blocks.{i}.ffn" in padded) for i, (_, f) in enumerate(widths)]
    writer.add_name(Path(str(view.config.get("_name_or_path") or view.model_type)).name)
    writer.add_type("model")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[type]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(int(text["vocab_size"]))
    writer.add_block_count(len(layout.pairs))
    writer.add_context_length(int(text.get("max_position_embeddings") or text["n_positions"]))
    writer.add_embedding_length(view.hidden)
    writer.add_head_count(heads if layout.graph.differs else heads[0])
    writer.add_head_count_kv(kv if layout.graph.differs else kv[0])
    writer.add_feed_forward_length(neurons if layout.graph.differs else neurons[0])
    if view.model_type == "gpt2":
        writer.add_layer_norm_eps(float(text["layer_norm_epsilon"]))
        return
    width = view.widths["attention"]["hd"]
    writer.add_layer_norm_rms_eps(float(text["rms_norm_eps"]))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = rope_of(text)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] == "default":
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)


def _with_defaults(view: ModelView) -> Mapping[str, Any]:
    """The configuration with what transformers takes where it does not say."""
    from transformers import AutoConfig

    return {**AutoConfig.for_model(view.model_type).to_dict(), **view.text}


def _rope_factors(view: ModelView) -> np.ndarray[Any, Any] | None:
    """By what llama.cpp divides the rotary frequencies of Llama 3.1 and later, float32 [width / 2]; None for others."""
    import numpy as np

    text = _with_defaults(view)
    rope = rope_of(text)
    if rope["rope_type"] != "llama3":
        return None
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    width = view.widths["attention"]["hd"]
    config = LlamaConfig(
        hidden_size=view.hidden,
        head_dim=width,
        max_position_embeddings=int(text["max_position_embeddings"]),
        rope_parameters=rope,
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    plain = float(rope["rope_theta"]) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    return (plain / scaled.double().numpy()).astype(np.float32)
