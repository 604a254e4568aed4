"""Which kind of checkpoint a plan gives, known before the cut."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prunekit.core.errors import PlanError
from prunekit.modeling.families import hetero_families
from prunekit.plan.cost import kept_hidden, kept_widths
from prunekit.plan.layer_fields import cache_refusal, refusal, ties
from prunekit.structure.parts import HIDDEN, WIDTHS

if TYPE_CHECKING:
    from prunekit.plan.plan import Plan
    from prunekit.structure.architecture import Architecture
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView

Kind = Literal["stock", "repacked", "heterogeneous"]
Pair = tuple[int | None, ...]


@dataclass(frozen=True)
class Layout:
    """How the result is laid out.

    Args:
        kind: `stock`: whole blocks went, or all narrowed alike; `repacked`: what is left pairs up into alike blocks;
            `heterogeneous`: blocks differ.
        pairs: for each block of the result the source block of its attention and that of its FFN, that of its
            cross-attention between them where its stack has some; None where it has none. Blocks count through the
            source's stacks; a heterogeneous result keeps their numbers.
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
        PlanError: if the layout wanted cannot hold it, or none can; if blocks need others.
    """
    if plan.drop and ties(view):
        raise PlanError(f"no sub-layer of `{view.model_type}` can go here", why=ties(view), hint="remove widths only")
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
    _require_hidden(view, plan)
    why = cache_refusal(view, [block.stack for block in view.blocks])
    if why:
        what = f"`{view.model_type}` cannot have blocks that differ here"
        raise PlanError(what, why=why, hint="remove whole blocks of that")
    there = {(sublayer.block, sublayer.kind) for sublayer in left}
    pairs = tuple(
        tuple(i if (i, kind) in there else None for kind in view.stack_of(i).kinds) for i in range(len(view.blocks))
    )
    return Layout("heterogeneous", pairs, reason)


def placed(view: ModelView, layout: Layout) -> Iterator[tuple[int, SubLayer]]:
    """Block number in the result, within its stack, and sub-layer of the source, in execution order."""
    numbers: dict[str, int] = {}
    for place, pair in enumerate(layout.pairs):
        # Where every sub-layer went the block is the source's of that place.
        source = next((block for block in pair if block is not None), place)
        stack = view.stack_of(source)
        number = numbers.get(stack.stack, 0)
        numbers[stack.stack] = number + 1
        for kind, block in zip(stack.kinds, pair, strict=True):
            sublayer = None if block is None else getattr(view.blocks[block], kind)
            if sublayer is not None:
                yield number, sublayer


def _require_hidden(view: ModelView, plan: Plan) -> None:
    """Makes sure that a configuration can say a narrower residual stream."""
    if HIDDEN not in plan.keep or "head_width" not in view.arch.keys:
        return
    heads = view.widths["attention"]["kv"] * view.widths["attention"]["rep"]
    narrow = kept_hidden(view, plan)
    if narrow % heads:
        why = f"its configuration wants a hidden width that {heads} heads divide"
        hint = f"use `multiple_of: {heads}`"
        raise PlanError(f"`{view.model_type}` cannot have {narrow} hidden channels", why=why, hint=hint)


def _stock(view: ModelView, plan: Plan, left: list[SubLayer]) -> tuple[Layout | None, str]:
    """The stock or repacked layout, or why there is none."""
    pairs: tuple[tuple[int, ...], ...] = ()
    for stack in view.arch.each:
        mine = [sublayer for sublayer in left if view.blocks[sublayer.block].stack == stack.stack]
        width = len(stack.kinds)
        if [sublayer.kind for sublayer in mine] != [*stack.kinds] * (len(mine) // width):
            return None, _turns(view, stack) if view.norm == "pre" else "blocks lack sub-layers"
        if not mine:
            return None, f"no block of the {stack.stack} is left"
        blocks = [sublayer.block for sublayer in mine]
        pairs += tuple(tuple(blocks[i : i + width]) for i in range(0, len(blocks), width))
    repacked = any(len(set(pair)) > 1 for pair in pairs)
    if repacked and view.norm != "pre":
        return None, "blocks lack sub-layers"
    reason = _unequal(view, plan, left) or _config_limit(view, plan, left) or refusal(view, pairs)
    return (None, reason) if reason else (Layout("repacked" if repacked else "stock", pairs), "")


def _turns(view: ModelView, stack: Architecture) -> str:
    if not stack.stack:
        return "attention and FFN no longer take turns"
    kinds = ", ".join(stack.kinds[:-1]).replace("_", "-")
    return f"{kinds} and FFN of the {stack.stack} no longer take turns"


def _unequal(view: ModelView, plan: Plan, left: list[SubLayer]) -> str:
    """Why the widths left cannot be said by a stock configuration, "" where they can."""
    alike: dict[tuple[str, ...], list[SubLayer]] = {}
    for sublayer in left:
        alike.setdefault((*sublayer.widths, *_keys(view, sublayer)), []).append(sublayer)
    for sublayers in alike.values():
        found = [kept_widths(sublayer, plan) for sublayer in sublayers]
        odd = next((i for i, widths in enumerate(found) if widths != found[0]), None)
        if odd is not None:
            return f"blocks have unequal widths: {_text(found[0])} and {_text(found[odd])}"
    changed = _changed(view, plan, left)
    if HIDDEN in plan.keep and "head_width" not in view.arch.keys:
        return f"the configuration of `{view.model_type}` ties the width of heads to the hidden width"
    unsayable = [kind for kind, (_, axis) in WIDTHS.items() if axis in changed and kind not in view.arch.stock_widths]
    if unsayable:
        return f"the configuration of `{view.model_type}` ties {unsayable[0]} to the hidden width"
    return ""


def _keys(view: ModelView, sublayer: SubLayer) -> list[str]:
    """The configuration's keys that give a sub-layer's widths; stacks may share them."""
    roles = ("heads", "kv_heads") if sublayer.role == "attention" else ("ffn", "experts")
    return [view.stack_of(sublayer.block).key(role, view.text) for role in roles]


def _changed(view: ModelView, plan: Plan, left: list[SubLayer]) -> set[str]:
    """Axes whose size is no longer the configuration's, by this plan or by a cut before it."""
    return {
        axis
        for sublayer in left
        for axis, size in kept_widths(sublayer, plan).items()
        if size != view.usual(sublayer)[axis]
    }


def _text(widths: dict[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in widths.items())


def _config_limit(view: ModelView, plan: Plan, left: list[SubLayer]) -> str:
    """What in the configuration forbids other numbers of heads in a stock model, "" where nothing does."""
    widths = next(kept_widths(sublayer, plan) for sublayer in left if sublayer.role == "attention")
    heads, hidden = widths["kv"] * widths["rep"], kept_hidden(view, plan)
    if not _changed(view, plan, left) & {"kv", "rep"} and HIDDEN not in plan.keep:
        return ""
    if hidden % heads:
        return f"the stock class wants a hidden width ({hidden}) that {heads} heads divide"
    rope = view.text.get("rope_parameters") or view.text.get("rope_scaling") or {}
    if isinstance(rope, dict) and rope.get("short_factor"):
        return "the stock class checks the factors of rotary positions by the number of heads"
    return ""
