"""The reference page of families: what can be cut of which model, from the architecture files."""

from __future__ import annotations

from collections.abc import Iterator

from prunekit.modeling.families import hetero_families
from prunekit.structure.architecture import Architecture, architectures
from prunekit.structure.parts import HIDDEN, WIDTHS

_TEXT = """\
For those who wonder whether their model can be cut. A model's `model_type` in `config.json` decides; `prunekit inspect`
of another one drafts the architecture file that is missing.

Blocks, attention and FFN sub-layers can go in every family. Whole blocks give a stock folder; sub-layers one by one
give one where what is left can be *repacked* into a shorter model, and a *heterogeneous* folder elsewhere.
[Formats](../concepts/formats.md) says what the words mean and where the folders load.

Widths read as follows. `stock`: the same number everywhere gives a stock folder, other numbers a heterogeneous one.
`heterogeneous`: the stock configuration has no word for it. `with its KV group`: every query head has a key and value
of its own. A dash: there are none. Every cell is tested: a cut model computes in float64 what the dense one computes
with the removed parts masked (in float32 behind a router).

Methods that run sub-layers one at a time (every search, and scores that need data) refuse models whose attention and
FFN read the same stream, and models with an encoder and a decoder. In those, cross-attention goes as attention does.

ONNX export is tested with llama, qwen2, qwen3, gpt2, bert and vit only. Models that see, and those with an encoder and
a decoder, are not exported.
"""
_COUNT = """\
Blocks, single sub-layers, KV groups, query heads, neurons, experts and hidden channels of {families} model types are
{cuts} pairs of a model type and a cut.
"""
_HEAD = "| model type | sub-layers | KV groups | query heads | neurons | experts |\n|---|---|---|---|---|---|"


def families_page(made: str) -> str:
    """Markdown of the page.

    Args:
        made: the line that says that the page is generated.
    """
    known = architectures()
    rows = [_row(model_type, known[model_type]) for model_type in sorted(known)]
    fixed = [
        f"- `{model_type}`: {kind} cannot go, since {why}."
        for model_type in sorted(known)
        for kind, why in sorted(known[model_type].fixed.items())
    ]
    notes = [
        f"- `{model_type}`: {_NOTES[known[model_type].norm]}"
        for model_type in sorted(known)
        if _note(known, model_type)
    ]
    count = _COUNT.format(cuts=len(possible_cuts()), families=len(known))
    return "\n".join(["# Families\n", made, _TEXT, count, _HEAD, *rows, "", *notes, *fixed])


def possible_cuts() -> list[tuple[str, str]]:
    """Every model type with every kind of cut that can be made of it."""
    return [(name, kind) for name, arch in sorted(architectures().items()) for kind in _kinds(name, arch)]


def _kinds(model_type: str, arch: Architecture) -> Iterator[str]:
    yield from ("blocks", "sublayers")
    there = {"query_heads": "kv_heads" in arch.keys, "experts": "experts" in arch.keys}
    yield from (kind for kind in WIDTHS if kind not in arch.fixed and there.get(kind, True))
    if arch.hidden is not None and model_type in arch.hidden.model_types:
        yield HIDDEN


_NOTES = {
    "post": "the sum is normalised after each sub-layer, so that nothing moves to another block.",
    "parallel": "both sub-layers of a block read the same stream, so that nothing moves to another block; with "
    "`use_parallel_residual: false` it is repacked like others.",
    "pre": "with `do_layer_norm_before: false` nothing moves to another block.",
}


def _note(known: dict[str, Architecture], model_type: str) -> bool:
    arch = known[model_type]
    return arch.norm != "pre" or bool(arch.norm_by)


def _row(model_type: str, arch: Architecture) -> str:
    other = "heterogeneous" if model_type in hetero_families() else "no"
    cells = [
        f"`{model_type}`",
        f"repacked or {other}" if arch.norm == "pre" else other,
        _width(arch, "kv_groups", other),
        _width(arch, "query_heads", other) if "kv_heads" in arch.keys else "with its KV group",
        _width(arch, "neurons", other),
        _width(arch, "experts", other) if "experts" in arch.keys else "-",
    ]
    return f"| {' | '.join(cells)} |"


def _width(arch: Architecture, kind: str, other: str) -> str:
    if kind in arch.fixed:
        return "no"
    return "stock" if kind in arch.stock_widths else other
