"""The steps of a recipe, one after the other, to one plan of the source model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.sources import ResolvedSource, resolve
from prunekit.core.errors import PlanError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import ALONE, Ranks, joined, place, require_one_process
from prunekit.core.recipe_model import REGISTRIES, Recipe, Step
from prunekit.core.types import Order, OrderStep, Scores
from prunekit.pipeline.costs import costs_of
from prunekit.pipeline.inputs import (
    check_methods,
    device_of,
    dtype_of,
    model_batch,
    offloaded,
    selected_batch,
    tokenizer_for,
)
from prunekit.pipeline.learning import check_learning, learned_after
from prunekit.pipeline.pattern import check_pattern
from prunekit.pipeline.trim import with_vocabulary
from prunekit.pipeline.weights import reading
from prunekit.plan.after import after
from prunekit.plan.allocate import allocate
from prunekit.plan.budget import Scored, Target, UnitCost, protected
from prunekit.plan.cost import Cost, cost, unit_cost
from prunekit.plan.fit_latency import spare
from prunekit.plan.layout import Layout, choose_layout
from prunekit.plan.plan import Plan
from prunekit.plan.require import obedient, rehearse, require_met
from prunekit.search._candidates import take_turns
from prunekit.structure.view import ModelView

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.calibrate.stack import Stack
    from prunekit.plan.costs import CostTable
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
        learned: new values of tensors by name, as `learn` leaves them in the cut model.
        learn: what the learning says about itself; empty without one.
        predictors: tensors of what chooses units for each input; empty where that is not learned.
        latency: the target of a latency budget, what was predicted, and the cost table; empty without one.
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
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    learn: Mapping[str, Any] = field(default_factory=dict)
    predictors: Mapping[str, Tensor] = field(default_factory=dict)
    latency: Mapping[str, Any] = field(default_factory=dict)
    vocab: Mapping[str, Any] = field(default_factory=dict)


def make_plan(
    recipe: Recipe, progress: Progress = NULL_PROGRESS, talk: Talk = silent, work: Path | None = None
) -> Made:
    """What a recipe removes, without writing a weight; the same in every rank, and for any number of them.

    Args:
        recipe: which model, what goes and who chooses.
        progress: bars.
        talk: told in a line what happens now.
        work: folder for the training checkpoints of `learn`, from which a killed run goes on; the caller deletes it.
    Raises:
        PrunekitError: of the kind that fits, before expensive work where it can be known then.
    """
    source = resolve(recipe.model.source, recipe.model.revision, progress=progress)
    view = ModelView.open(source.folder)
    for step in recipe.steps:
        view.groups(step.remove)
    check_methods(view, recipe)
    rehearse(recipe, view)
    if recipe.learn is not None:
        require_one_process("learn")
    if any(step.budget.latency_ms is not None for step in recipe.steps):
        require_one_process("latency_ms")
    table = costs_of(recipe, view, device_of(recipe), progress, talk)
    check_learning(view, recipe)
    check_pattern(view, recipe)
    plan, orders = Plan.make(view), []
    with joined() as ranks:
        for number, step in enumerate(recipe.steps, 1):
            talk(f"step {number} of {len(recipe.steps)}: remove {step.remove} by {step.by.name}")
            with Bench(recipe, view, plan, progress, table, ranks, talk) as bench:
                cuts, found = _choose(obedient(recipe, step, view, plan), bench)
            plan = plan.then(view, cuts)
            orders.append(found)
        # Nothing is written before every rank has checked that it may be.
        ranks.wait()
    learned = None
    if recipe.learn is not None:
        talk(f"learning masks by {recipe.learn.method}")
        with Bench(recipe, view, plan, progress, talk=talk) as bench:
            learned = learned_after(recipe, view, bench.view, plan, bench.folder, work, progress, talk)
        plan = plan.then(view, learned.plan)
    require_met(recipe, view, plan)
    layout = choose_layout(view, plan, recipe.export.layout)
    latency = {} if table is None else _predicted(recipe, view, plan, table)
    made = Made(source, view, plan, layout, cost(view), cost(view, plan), tuple(orders), latency=latency)
    if learned is not None:
        made = replace(made, learned=learned.tensors, learn=learned.about, predictors=learned.predictors)
    return with_vocabulary(recipe, made, talk)


def _predicted(recipe: Recipe, view: ModelView, plan: Plan, table: CostTable) -> dict[str, Any]:
    """The last step's target and what the table says of the model before and after."""
    targets = [step.budget.latency_ms for step in recipe.steps if step.budget.latency_ms is not None]
    return {
        "target_ms": targets[-1],
        "on": table.on,
        "batch": table.batch,
        "tokens": table.tokens,
        "dense_predicted_ms": table.predict(view),
        "predicted_ms": table.predict(view, plan),
        "costs": table.to_json(),
    }


class Bench:
    """The model as earlier steps left it, loaded only when a method asks for it.

    Args:
        recipe: how to load it and what to run it on.
        source: the model before any cut.
        plan: cuts of earlier steps.
        progress: bars.
        table: what latency budgets are reckoned by; None without one.
        ranks: processes that choose together.
        talk: told in a line what happens now.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: ModelView,
        plan: Plan,
        progress: Progress,
        table: CostTable | None = None,
        ranks: Ranks = ALONE,
        talk: Talk = silent,
    ) -> None:
        self.recipe, self.source, self.plan, self.progress = recipe, source, plan, progress
        self.table, self.ranks, self.talk = table, ranks, talk
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
        select = calibrate.select
        if select is not None:
            return self.ranks.of_first(lambda: selected_batch(self.source, tokenizer, self.recipe, select, self.talk))
        return model_batch(self.source, tokenizer, calibrate, calibrate.seed)

    @cached_property
    def folder(self) -> Path:
        """The model's folder. Earlier cuts are carried out in a temporary one first."""
        from prunekit.surgery import engine

        if not self.plan.drop and not self.plan.keep:
            return self.source.checkpoint.folder
        # Block numbers stay in a heterogeneous folder, so addresses mean the same.
        folder = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="prunekit-step-")))
        layout = choose_layout(self.source, self.plan, "heterogeneous")
        engine.apply(self.source, self.plan, folder, progress=self.progress, layout=layout)
        return folder

    @cached_property
    def stack(self) -> Stack:
        """The model, sub-layer by sub-layer."""
        from prunekit.calibrate.stack import Stack
        from prunekit.modeling.load import load_model

        device = device_of(self.recipe)
        dtype = dtype_of(self.recipe, self.source, device)
        offload = offloaded(self.recipe, self.source, device, dtype)
        return Stack(load_model(self.folder, dtype, place(device), self.recipe.model.trust_remote_code, offload))


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
    cuts = allocate(bench.source, bench.view, step.remove, scored, step.budget, bench.table)
    units = tuple(unit for part in scored for unit in part.group.units)
    values = tuple(value for part in scored for value in part.values)
    return cuts, Scores(step.by.name, step.remove, units, values, _provenance(method, bench, bool(method.needs)))


def _statistics(needs: tuple[str, ...], bench: Bench) -> dict[str, Tensor]:
    if not needs:
        return {}
    from prunekit.calibrate.collect import collect

    batch = bench.batch
    return collect(bench.stack, batch, needs, bench.progress, bench.ranks)


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
    costs = _unit_costs(bench)
    evaluator = _evaluator(bench, safe, costs) if method.needs else _Shapes(bench.view, safe, costs)
    target = Target(bench.source, bench.view, step.budget, step.remove, len(units), evaluator.cost, bench.table)
    in_unit = 2 if step.remove == "blocks" else 1
    most = (len(units) - step.budget.min_keep) * in_unit

    def enough(removed: frozenset[str]) -> bool:
        if target.of == "units":
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
    spared: list[str] = []
    if step.budget.latency_ms is not None:
        drop, spared = _without_spare(order.steps, target, evaluator, bench.view)
    if step.budget.keep_alternating and not take_turns(unit for unit in units if unit not in drop):
        raise PlanError(
            "attention and FFN would not go on taking turns",
            why=f"`{step.by.name}` removes others than pairs of neighbours",
            hint="search again with `keep_alternating: true`, or take it out",
        )
    provenance = {**_provenance(method, bench, bool(method.needs)), **order.provenance}
    if spared:
        provenance["spared"] = spared
    return Plan.make(bench.view, drop), Order(step.by.name, order.steps, provenance)


def _unit_costs(bench: Bench) -> UnitCost:
    """Cost of a sub-layer in a measure; the table of latency budgets also says its milliseconds."""
    view, table = bench.view, bench.table

    def cost_of(address: str, of: str) -> float:
        if of == "latency_ms" and table is not None:
            return table.unit_ms(view, address)
        return unit_cost(view, address, of)

    return cost_of


def _without_spare(
    steps: Sequence[OrderStep], target: Target, evaluator: Any, view: ModelView
) -> tuple[list[str], list[str]]:
    """Sub-layers of a search that go, and those that the target turned out not to need.

    None is spared where attention and FFN took turns after the whole order and would not without it, or where the
    outputs would be further off.
    """
    whole = [unit for step in steps for unit in step.units]
    drop = [unit for step in spare(steps, target) for unit in step.units]
    left = [sublayer.address for sublayer in view.sublayers]
    turned, turns = (take_turns(unit for unit in left if unit not in gone) for gone in (whole, drop))
    if set(drop) == set(whole) or (turned and not turns):
        return whole, []
    if isinstance(evaluator, _Shapes) or evaluator.mean(evaluator.whole([frozenset(drop)])[0]) <= steps[-1].distance:
        return drop, [unit for unit in whole if unit not in drop]
    return whole, []


def _evaluator(bench: Bench, safe: frozenset[str], costs: UnitCost) -> Any:
    from prunekit.search._evaluator import Evaluator

    batch = bench.batch
    known = bench.table is not None
    return Evaluator(bench.stack, batch, costs, safe, latency_known=known, ranks=bench.ranks)


class _Shapes:
    """What a search that runs nothing may know of a model."""

    def __init__(self, view: ModelView, protected: frozenset[str], costs: UnitCost) -> None:
        self.addresses = tuple(sublayer.address for sublayer in view.sublayers)
        self.protected = protected
        self.cost = costs


def _provenance(method: Any, bench: Bench, ran: bool) -> dict[str, Any]:
    """The method's knobs, defaults written out, and what it was run on."""
    found: dict[str, Any] = {"knobs": asdict(method)}
    if ran:
        found["calibrate"] = bench.recipe.calibrate.model_dump()
    return found
