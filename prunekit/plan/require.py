"""Where a recipe says that its result must load: steps that obey, or one error before anything is run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import PlanError
from prunekit.core.recipe_model import ALTERNATING
from prunekit.plan.after import after
from prunekit.plan.allocate import allocate
from prunekit.plan.budget import Scored
from prunekit.plan.layout import choose_layout
from prunekit.plan.loads import Place, places, runtimes
from prunekit.plan.plan import Plan
from prunekit.search._candidates import take_turns
from prunekit.structure.parts import HIDDEN, WIDTHS

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Recipe, Step
    from prunekit.structure.view import ModelView


def rehearse(recipe: Recipe, view: ModelView) -> None:
    """Makes sure that a recipe's `require` and `keep_alternating` can be kept; no method is run.

    All units get the same score, which shows the widths and the layout that the result will have, whichever units go.

    Raises:
        PlanError: naming the rule, the step and what to change.
    """
    if not recipe.require and not any(step.budget.keep_alternating for step in recipe.steps):
        return
    plan, broken = Plan.make(view), 0
    for name, place in unmet(recipe, view, plan):
        what = f"`require: {name}` cannot be kept, whatever is removed"
        raise PlanError(what, why=_why(place), hint=place.change or f"take {name} out of `require`", at="require")
    for number, step in enumerate(recipe.steps, 1):
        obeying = obedient(recipe, step, view, plan)
        try:
            plan = plan.then(view, _stand_in(obeying, view, plan))
        except PlanError as error:
            if step.remove not in WIDTHS and step.remove != HIDDEN:
                # Which whole units go may decide whether a budget is reached.
                return
            why = f"{error.why}; `require` asks for multiples of {obeying.budget.multiple_of}"
            forced = obeying.budget.multiple_of != step.budget.multiple_of
            raise PlanError(error.what, why if forced else error.why, error.hint, f"steps.{number - 1}") from error
        broken = broken or (number if unmet(recipe, view, plan) else 0)
    require_met(recipe, view, plan, broken)


def require_met(recipe: Recipe, view: ModelView, plan: Plan, step: int = 0) -> None:
    """Makes sure that the result of a plan loads wherever it must.

    Args:
        recipe: says where.
        view: the model before the cut.
        plan: all steps.
        step: number of the step after which it no longer did, 0 where that is not known.
    Raises:
        PlanError: if it does not.
    """
    for name, place in unmet(recipe, view, plan):
        where = f"after step {step}, remove {recipe.steps[step - 1].remove}: " if step else ""
        hint = place.change or f"take {name} out of `require`, or change the step"
        raise PlanError(
            f"`require: {name}` cannot be kept",
            why=f"{where}{_why(place)}",
            hint=hint,
            at=f"steps.{step - 1}" if step else "require",
        )


def _why(place: Place) -> str:
    said = place.how if place.loads is False else f"it is not known: {place.how}"
    return f"{place.title}: {said}" + (f" ({place.source})" if place.source else "")


def unmet(recipe: Recipe, view: ModelView, plan: Plan) -> list[tuple[str, Place]]:
    """Where the result of a plan must load and does not, or nobody knows whether it does."""
    if not recipe.require:
        return []
    found = places(view, plan, choose_layout(view, plan, recipe.export.layout))
    return [(name, found[name]) for name in recipe.require if found[name].loads is not True]


def obedient(recipe: Recipe, step: Step, view: ModelView, plan: Plan) -> Step:
    """A step that can only choose what leaves the requirement reachable.

    Sub-layers go in pairs, units whose removal would break it stay, and FFNs keep the multiples that the runtime's
    quantised types store rows in, where the model has them.

    Args:
        recipe: says where the result must load.
        step: one of its steps.
        view: the model before any cut.
        plan: cuts of the steps before.
    Raises:
        PlanError: if the step's own search is told to do otherwise, or `keep_alternating` is not possible.
    """
    here, budget = after(view, plan), step.budget
    changes: dict[str, Any] = {}
    if recipe.require and _keeps(recipe, view, plan, ()):
        if step.remove == "neurons" and budget.within == "group":
            changes["multiple_of"] = math.lcm(budget.multiple_of, _rows(recipe, here))
        elif step.remove == "sublayers" and not budget.keep_alternating:
            single = (s.address for s in here.sublayers)
            changes["keep_alternating"] = any(not _keeps(recipe, view, plan, (address,)) for address in single)
    alternating = bool(changes.get("keep_alternating", budget.keep_alternating))
    if alternating:
        _require_turns(step, view, plan, here)
    if recipe.require and (step.remove == "blocks" or alternating):
        changes["protect"] = (*budget.protect, *_stuck(recipe, view, plan, here, step.remove))
    return step.model_copy(update={"budget": budget.model_copy(update=changes)}) if changes else step


def _keeps(recipe: Recipe, view: ModelView, plan: Plan, more: Iterable[str]) -> bool:
    """Whether the result still loads wherever it must when these sub-layers go too."""
    drop = {*plan.drop, *more}
    if len(drop) == len(view.sublayers):
        return False
    keep = {address: kept for address, kept in plan.keep.items() if address.rpartition(".")[0] not in drop}
    try:
        return not unmet(recipe, view, Plan.make(view, drop, keep))
    except PlanError:
        return False


def _rows(recipe: Recipe, here: ModelView) -> int:
    """Multiple of FFN neurons that the required runtimes store rows in; 1 where the model has none such."""
    rows = math.lcm(*(runtimes()[name].quantised_rows for name in recipe.require if name in runtimes()))
    return rows if all(s.widths["ffn"] % rows == 0 for s in here.sublayers if s.kind == "ffn") else 1


def _stuck(recipe: Recipe, view: ModelView, plan: Plan, here: ModelView, kind: str) -> tuple[str, ...]:
    """Units that cannot go, alone or with a neighbour, without breaking the requirement; none if that holds for all."""
    addresses = [s.address for s in here.sublayers]
    if kind == "blocks":
        parts = [(b.address, [s.address for s in b.sublayers]) for b in here.blocks if b.sublayers]
        stuck = [unit for unit, gone in parts if not _keeps(recipe, view, plan, gone)]
        return tuple(stuck) if len(stuck) < len(parts) else ()
    free = {address for pair in pairwise(addresses) if _keeps(recipe, view, plan, pair) for address in pair}
    return tuple(address for address in addresses if address not in free) if free else ()


def _require_turns(step: Step, view: ModelView, plan: Plan, here: ModelView) -> None:
    """`keep_alternating` needs a model whose sub-layers take turns, and can be paired anew."""
    if view.arch.stacks:
        raise PlanError(
            "sub-layers of a model with several stacks cannot go in pairs",
            why="blocks of the decoder have a cross-attention between attention and FFN",
            hint="use `remove: blocks`",
        )
    candidates = step.by.knobs.get("candidates")
    if candidates is not None and candidates not in ALTERNATING:
        raise PlanError(
            f"`candidates: {candidates}` breaks the turns of attention and FFN",
            why="the result must be a stock model, by `require`",
            hint="take `candidates` out, or use pairs",
        )
    addresses = [s.address for s in here.sublayers]
    if not take_turns(addresses):
        raise PlanError(
            "attention and FFN do not take turns before `keep_alternating`",
            why="an earlier step or an earlier cut left them so",
            hint="remove both in one step, by `remove: sublayers` or `remove: blocks`",
        )
    if len(addresses) > 2:
        try:
            # An FFN and the attention after it.
            choose_layout(view, Plan.make(view, {*plan.drop, *addresses[-3:-1]}), "stock")
        except PlanError as error:
            what = "sub-layers of this model cannot be paired anew, which `keep_alternating` needs"
            raise PlanError(what, why=error.why, hint="use `remove: blocks`") from error


def _stand_in(step: Step, view: ModelView, plan: Plan) -> Plan:
    """Cuts of a step if all units were worth the same."""
    here, budget = after(view, plan), step.budget
    if budget.latency_ms is not None:
        # How much goes is not known before the costs are; which kind goes decides where the result loads.
        budget = budget.model_copy(update={"latency_ms": None, "remove": 0.05, "of": "units"})
    elif budget.of == "latency_ms":
        budget = budget.model_copy(update={"of": "params"})
    scored = [Scored(group, [0.0] * len(group.units)) for group in here.groups(step.remove)]
    return allocate(view, here, step.remove, scored, budget)
