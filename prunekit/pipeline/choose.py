"""The steps of a recipe, one after the other, to one plan of the source model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.sources import ResolvedSource, resolve
from prunekit.core.errors import PlanError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.recipe_model import REGISTRIES, Recipe, Step
from prunekit.core.types import Order, Scores
from prunekit.pipeline.inputs import device_of, dtype_of, model_batch, offloaded, selected_batch, tokenizer_for
from prunekit.pipeline.trim import with_vocabulary
from prunekit.pipeline.weights import reading
from prunekit.plan.after import after
from prunekit.plan.allocate import Scored, allocate
from prunekit.plan.budget import Target, protected
from prunekit.plan.cost import Cost, cost, unit_cost
from prunekit.plan.layout import Layout, choose_layout
from prunekit.plan.plan import Plan
from prunekit.plan.require import obedient, rehearse, require_met
from prunekit.search._candidates import take_turns
from prunekit.structure.view import ModelView

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.calibrate.stack import Stack
    from prunekit.repair._fit import Projection

Talk = Callable[[str], None]


def silent(text: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class Made:
    """A plan and what it was made from.

    Args:
        source: where the model came from.
        view: the model before the cut.
        plan: all steps together.
        layout: how the result will be laid out.
        before: cost of the model.
        after: cost of what the plan leaves.
        orders: what each step's method said, in order.
        repaired: new output projections by the address of their sub-layer.
        vocab: what the trimming of the vocabulary says about itself; empty without one.
        repair: what the repair says about itself; empty without one.
    """

    source: ResolvedSource
    view: ModelView
    plan: Plan
    layout: Layout
    before: Cost
    after: Cost
    orders: tuple[Scores | Order, ...]
    repaired: Mapping[str, Projection] = field(default_factory=dict)
    repair: Mapping[str, Any] = field(default_factory=dict)
    vocab: Mapping[str, Any] = field(default_factory=dict)


def make_plan(recipe: Recipe, progress: Progress = NULL_PROGRESS, talk: Talk = silent) -> Made:
    """What a recipe removes, without writing a weight.

    Args:
        recipe: which model, what goes and who chooses.
        progress: bars.
        talk: told in a line what happens now.
    Raises:
        PrunekitError: of the kind that fits, before expensive work where it can be known then.
    """
    source = resolve(recipe.model.source, recipe.model.revision, progress=progress)
    view = ModelView.open(source.folder)
    for step in recipe.steps:
        view.groups(step.remove)
    rehearse(recipe, view)
    plan, orders = Plan.make(view), []
    for number, step in enumerate(recipe.steps, 1):
        talk(f"step {number} of {len(recipe.steps)}: remove {step.remove} by {step.by.name}")
        with Bench(recipe, view, plan, progress) as bench:
            cuts, found = _choose(obedient(recipe, step, view, plan), bench)
        plan = plan.then(view, cuts)
        orders.append(found)
    require_met(recipe, view, plan)
    layout = choose_layout(view, plan, recipe.export.layout)
    made = Made(source, view, plan, layout, cost(view), cost(view, plan), tuple(orders))
    return with_vocabulary(recipe, made, talk)


class Bench:
    """The model as earlier steps left it, loaded only when a method asks for it.

    Args:
        recipe: how to load it and what to run it on.
        source: the model before any cut.
        plan: cuts of earlier steps.
        progress: bars.
    """

    def __init__(self, recipe: Recipe, source: ModelView, plan: Plan, progress: Progress) -> None:
        self.recipe, self.source, self.plan, self.progress = recipe, source, plan, progress
        self.view = after(source, plan)
        self._open = ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @cached_property
    def batch(self) -> Mapping[str, Tensor]:
        """Calibration inputs; made before the model is loaded, so that missing data costs nothing."""
        calibrate, tokenizer = self.recipe.calibrate, tokenizer_for(self.source, self.recipe)
        if calibrate.select is not None:
            return selected_batch(self.source, tokenizer, self.recipe, calibrate.select)
        return model_batch(self.source, tokenizer, calibrate, calibrate.seed)

    @cached_property
    def stack(self) -> Stack:
        """The model, sub-layer by sub-layer. Earlier cuts are carried out in a temporary folder first."""
        from prunekit.calibrate.stack import Stack
        from prunekit.modeling.load import load_model
        from prunekit.surgery import engine

        folder = self.source.checkpoint.folder
        if self.plan.drop or self.plan.keep:
            # Block numbers stay in a heterogeneous folder, so addresses mean the same.
            folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="prunekit-step-")))
            layout = choose_layout(self.source, self.plan, "heterogeneous")
            engine.apply(self.source, self.plan, folder, progress=self.progress, layout=layout)
        device = device_of(self.recipe)
        dtype = dtype_of(self.recipe, self.source, device)
        offload = offloaded(self.recipe, self.source, device, dtype)
        return Stack(load_model(folder, dtype, device, self.recipe.model.trust_remote_code, offload))


def _choose(step: Step, bench: Bench) -> tuple[Plan, Scores | Order]:
    """Cuts of `bench.view` that a step makes, and what its method said."""
    method = REGISTRIES[step.by.role].get(step.by.name)(**step.by.knobs)
    if step.by.role == "search":
        return _searched(step, method, bench)
    return _scored(step, method, bench)


def _scored(step: Step, method: Any, bench: Bench) -> tuple[Plan, Scores]:
    stats = _statistics(method.needs, bench)
    groups = bench.view.groups(step.remove)
    scored = []
    with bench.progress.task(f"scoring {step.remove}", total=len(groups), unit="groups") as task:
        weights = reading(bench.source, bench.plan)
        for group in groups:
            scored.append(Scored(group, method.score(group, weights, stats).tolist()))
            task.advance(1)
    _require_numbers(step, scored)
    cuts = allocate(bench.source, bench.view, step.remove, scored, step.budget)
    units = tuple(unit for part in scored for unit in part.group.units)
    values = tuple(value for part in scored for value in part.values)
    return cuts, Scores(step.by.name, step.remove, units, values, _provenance(method, bench, bool(method.needs)))


def _statistics(needs: tuple[str, ...], bench: Bench) -> dict[str, Tensor]:
    if not needs:
        return {}
    from prunekit.calibrate.collect import collect

    batch = bench.batch
    return collect(bench.stack, batch, needs, bench.progress)


def _require_numbers(step: Step, scored: list[Scored]) -> None:
    for part in scored:
        for unit, value in zip(part.group.units, part.values, strict=True):
            if value != value:
                raise PlanError(f"`{step.by.name}` gives `{unit}` a score that is not a number")


def _searched(step: Step, method: Any, bench: Bench) -> tuple[Plan, Order]:
    units = bench.view.groups(step.remove)[0].units
    safe = protected(step.budget.protect, units)
    # A protected block protects its sub-layers.
    safe |= {s.address for s in bench.view.sublayers if s.address.rpartition(".")[0] in safe}
    evaluator = _evaluator(bench, safe) if method.needs else _Shapes(bench.view, safe)
    target = Target(bench.source, bench.view, step.budget, step.remove, len(units), evaluator.cost)
    in_unit = 2 if step.remove == "blocks" else 1
    most = (len(units) - step.budget.min_keep) * in_unit

    def enough(removed: frozenset[str]) -> bool:
        if step.budget.of == "units":
            return target.reached(len(removed) / in_unit)
        return target.reached(sum(target.cost(address) for address in removed))

    order = method.propose(evaluator, enough, bench.progress, "pairs" if step.budget.keep_alternating else step.remove)
    drop = [address for part in order.steps for address in part.units]
    if len(drop) > most or not enough(frozenset(drop)):
        raise PlanError(
            f"the budget cannot be reached by removing {step.remove}",
            why=f"{step.budget.min_keep} of {len(units)} must stay",
            hint="remove less",
        )
    if step.budget.keep_alternating and not take_turns(unit for unit in units if unit not in drop):
        raise PlanError(
            "attention and FFN would not go on taking turns",
            why=f"`{step.by.name}` removes others than pairs of neighbours",
            hint="search again with `keep_alternating: true`, or take it out",
        )
    provenance = {**_provenance(method, bench, bool(method.needs)), **order.provenance}
    return Plan.make(bench.view, drop), Order(step.by.name, order.steps, provenance)


def _evaluator(bench: Bench, safe: frozenset[str]) -> Any:
    from prunekit.search._evaluator import Evaluator

    batch = bench.batch
    return Evaluator(bench.stack, batch, partial(unit_cost, bench.view), safe)


class _Shapes:
    """What a search that runs nothing may know of a model."""

    def __init__(self, view: ModelView, protected: frozenset[str]) -> None:
        self.addresses = tuple(sublayer.address for sublayer in view.sublayers)
        self.protected = protected
        self.cost = partial(unit_cost, view)


def _provenance(method: Any, bench: Bench, ran: bool) -> dict[str, Any]:
    """The method's knobs, defaults written out, and what it was run on."""
    found: dict[str, Any] = {"knobs": asdict(method)}
    if ran:
        found["calibrate"] = bench.recipe.calibrate.model_dump()
    return found
