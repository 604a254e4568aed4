"""Which kind of checkpoint a plan gives, and where that loads; known before the cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prunekit.core.errors import PlanError
from prunekit.modeling.families import auto_class, hetero_families
from prunekit.plan.cost import kept_widths
from prunekit.structure.view import WIDTHS

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView, SubLayer

Kind = Literal["stock", "repacked", "heterogeneous"]
Pair = tuple[int | None, int | None]


@dataclass(frozen=True)
class Layout:
    """How the result is laid out.

    Args:
        kind: `stock`: whole blocks went, or all narrowed alike; `repacked`: what is left pairs up into alike blocks;
            `heterogeneous`: blocks differ.
        pairs: for each block of the result the source block of its attention and that of its FFN; None where it has
            none. A heterogeneous result keeps the source's block numbers.
        reason: why not stock, "" where it is.
    """

    kind: Kind
    pairs: tuple[Pair, ...]
    reason: str = ""


def choose_layout(view: ModelView, plan: Plan, wanted: str = "auto") -> Layout:
    """The simplest layout that can hold what a plan leaves: stock, else repacked, else heterogeneous.

    Args:
        view: the model before the cut.
        plan: the cuts.
        wanted: `auto`; `stock`, which a repacked result fulfils too; or `heterogeneous`.
    Raises:
        PlanError: if the layout wanted cannot hold it, or none can.
    """
    left = [sublayer for sublayer in view.sublayers if sublayer.address not in plan.drop]
    layout, reason = _stock(view, plan, left)
    if layout is not None and wanted != "heterogeneous":
        return layout
    if wanted == "stock":
        hint = "remove whole blocks, or the same widths in all; or leave `layout` at auto"
        raise PlanError("the result cannot be a stock model", why=reason, hint=hint)
    if view.model_type not in hetero_families():
        known = ", ".join(hetero_families())
        raise PlanError(f"`{view.model_type}` cannot have blocks that differ", why=reason, hint=f"known are: {known}")
    there = {sublayer.address for sublayer in left}
    pairs = tuple(
        (
            i if f"blocks.{i}.attention" in there else None,
            i if f"blocks.{i}.ffn" in there else None,
        )
        for i in range(len(view.blocks))
    )
    return Layout("heterogeneous", pairs, reason)


def _stock(view: ModelView, plan: Plan, left: list[SubLayer]) -> tuple[Layout | None, str]:
    """The stock or repacked layout, or why there is none."""
    kinds = [sublayer.kind for sublayer in left]
    if kinds != ["attention", "ffn"] * (len(kinds) // 2):
        return None, "attention and FFN no longer take turns" if view.arch.norm == "pre" else "blocks lack sub-layers"
    pairs: tuple[Pair, ...] = tuple((a.block, f.block) for a, f in zip(left[::2], left[1::2], strict=True))
    repacked = any(a != f for a, f in pairs)
    if repacked and view.arch.norm == "post":
        return None, "blocks lack sub-layers"
    moved = any(pair != (i, i) for i, pair in enumerate(pairs))
    reason = _unequal(view, plan, left) or _config_limit(view, plan, left, moved)
    return (None, reason) if reason else (Layout("repacked" if repacked else "stock", pairs), "")


def _unequal(view: ModelView, plan: Plan, left: list[SubLayer]) -> str:
    """Why the widths left cannot be said by a stock configuration, "" where they can."""
    for kind in ("attention", "ffn"):
        found = [kept_widths(sublayer, plan) for sublayer in left if sublayer.kind == kind]
        odd = next((i for i, widths in enumerate(found) if widths != found[0]), None)
        if odd is not None:
            return f"blocks have unequal widths: {_text(found[0])} and {_text(found[odd])}"
    changed = _changed(view, plan, left)
    unsayable = [kind for kind, (_, axis) in WIDTHS.items() if axis in changed and kind not in view.arch.stock_widths]
    if unsayable:
        return f"the configuration of `{view.model_type}` ties {unsayable[0]} to the hidden width"
    return ""


def _changed(view: ModelView, plan: Plan, left: list[SubLayer]) -> set[str]:
    """Axes whose size is no longer the configuration's, by this plan or by a cut before it."""
    widths = {**kept_widths(left[0], plan), **kept_widths(left[1], plan)}
    return {axis for axis, size in widths.items() if size != view.widths[axis]}


def _text(widths: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in widths.items())


def _config_limit(view: ModelView, plan: Plan, left: list[SubLayer], moved: bool) -> str:
    """What in the configuration forbids a stock result, "" where nothing does."""
    widths = kept_widths(left[0], plan)
    heads = widths["kv"] * widths["rep"]
    if _changed(view, plan, left) & {"kv", "rep"} and view.hidden % heads:
        return f"the stock class wants a hidden width ({view.hidden}) that {heads} heads divide"
    if moved and view.config.get("scale_attn_by_inverse_layer_idx"):
        return "`scale_attn_by_inverse_layer_idx` ties a block's scale to its number"
    depth = len(view.blocks)
    if depth > 1 and len(left) // 2 != depth:
        for key, value in view.config.items():
            if isinstance(value, list) and len(value) == depth and key not in view.arch.lists:
                return f"the list `{key}` of the configuration is as long as the model is deep, and nobody knows why"
    return ""


def loads(view: ModelView, layout: Layout) -> dict[str, str]:
    """Where a result loads, and how.

    What is said of transformers and ONNX Runtime is what `prunekit verify` and the export check; the rest follows from
    the configuration being a stock one.
    """
    auto = auto_class(view.config.get("architectures") or ())
    if layout.kind == "heterogeneous":
        no = f"no: {layout.reason or 'blocks differ'}"
        return {
            "transformers": f"{auto} with trust_remote_code=True, by the file in the folder",
            "transformers and prunekit": f"{auto} after `import prunekit`",
            "ONNX Runtime": "through `prunekit export`",
            "vLLM, TensorRT-LLM, llama.cpp": no,
        }
    return {
        "transformers": f"{auto}, no custom code",
        "ONNX Runtime": "through `prunekit export`",
        "vLLM, TensorRT-LLM, llama.cpp": "wherever the dense model runs: class and tensor names are its own",
    }
