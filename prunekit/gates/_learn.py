"""One learning of masks from start to end: gates in the model, the loop of healing, the plan and the folded weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import UsageError
from prunekit.core.ranks import place
from prunekit.core.registry import GATES
from prunekit.gates._costs import Costs
from prunekit.gates._places import Place, places_of
from prunekit.gates._select import Chooser
from prunekit.heal.scene import Scene

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prunekit.core.recipe_learn import Learn
    from prunekit.heal._data import Data
    from prunekit.heal.scene import Objective
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView


@dataclass(frozen=True)
class Task:
    """What is to be learned.

    Args:
        asked: the recipe's `learn`.
        view: the model as earlier steps left it.
        whole: what the blocks of the model cost before any cut, in the budget's measure.
    """

    asked: Learn
    view: ModelView
    whole: float

    @property
    def goal(self) -> float:
        """Cost to remove."""
        return self.asked.budget.remove * self.whole

    @cached_property
    def places(self) -> tuple[Place, ...]:
        """All units that can go."""
        return places_of(self.view, self.asked.remove)

    @cached_property
    def costs(self) -> Costs:
        """What they cost."""
        return Costs(self.view, self.asked.budget.of, self.places)

    @cached_property
    def chooser(self) -> Chooser:
        """Decides which go."""
        return Chooser(self.places, self.costs, self.asked.budget, self.goal)

    def check(self) -> None:
        """Fails where the budget cannot be met, whatever is learned.

        Raises:
            PlanError: saying how much can go.
            StructureError: where no gate can be put.
        """
        import torch

        self.chooser.choose(torch.zeros(sum(len(place.units) for place in self.places)))


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Args:
        plan: what goes, of the task's model.
        tensors: new values of tensors that stay, by name, in their stored types and the shapes that the plan leaves.
        about: what the learning says about itself.
        predictors: tensors of predictors by name, where units are chosen for each input and none goes.
    """

    plan: Plan
    tensors: Mapping[str, Tensor]
    about: Mapping[str, Any]
    predictors: Mapping[str, Tensor] = field(default_factory=dict)


class _Both:
    """The task's loss, and in training the gates' own beside it."""

    def __init__(self, objective: Objective, gates: torch.nn.Module, own: Any) -> None:
        self.hidden_states, self.teacher = objective.hidden_states, objective.teacher
        self.of_tokens = objective.of_tokens
        self._objective, self._gates, self._own = objective, gates, own

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        loss = self._objective(outputs, inputs, rows)
        return loss + self._own() if self._gates.training else loss


def check(asked: Learn, decoder: bool) -> None:
    """Everything about method and texts that would end a learning later.

    Raises:
        UsageError: if the method does not fit the model, or a text is missing or empty.
    """
    from prunekit.heal.run import check_texts

    GATES.get(asked.method)(**asked.knobs).check(decoder)
    check_texts(asked, decoder)


def is_dynamic(asked: Learn) -> bool:
    """Whether units are chosen for each input, so that no weight and no shape changes."""
    return bool(getattr(GATES.get(asked.method), "dynamic", False))


_SHAPES = {"multiple_of": 1, "min_keep": 1, "within": "model", "protect": ()}


def check_dynamic(asked: Learn) -> None:
    """Fails for parts of a budget that are about what is cut.

    Raises:
        UsageError: naming them.
    """
    odd = [f"`{name}`" for name, usual in _SHAPES.items() if getattr(asked.budget, name) != usual]
    if odd:
        raise UsageError(
            f"{', '.join(odd)} of the budget of `learn` does not go with `method: {asked.method}`",
            why="it cuts nothing: each input has units of its own",
            hint="take it out",
        )


def _foretelling(gates: Any, model: Any, data: Data, asked: Learn, told: dict[str, Any]) -> Learned:
    """Predictors beside a model that stays as it is."""
    from prunekit.plan.plan import Plan

    length = next(iter(data.inputs.values())).shape[1]
    about = {
        **told,
        "dynamic": True,
        # Models that read the whole sequence before they choose have none to wait for.
        "tokens_first": gates.tokens,
        "tokens": told["steps_done"] * asked.batch * length,
        "trained_sequences": len(data.train),
        "held_out_sequences": len(data.held_out),
        "sequences_of": list(data.shares),
        "threshold": 0.0,
        **gates.told(model, data, asked.batch),
    }
    return Learned(Plan.make(gates.task.view), {}, about, gates.tensors())


def learn(scene: Scene, task: Task, work: Path) -> Learned:
    """Trains gates in the model and takes what they say.

    Args:
        scene: the model as earlier steps left it is the student, the dense one the teacher.
        task: what can go, and how much.
        work: folder for checkpoints. A killed run goes on from there; it is the caller's to delete.
    Raises:
        PlanError: if the budget cannot be met.
        HealError: where training cannot go on.
        UsageError: where the data or the method does not fit the model.
    """
    from prunekit.gates._fold import folded, plan_of
    from prunekit.heal._checkpoints import working
    from prunekit.heal._data import gather
    from prunekit.heal._loop import train
    from prunekit.heal._weights import names_of
    from prunekit.modeling.load import load_model
    from prunekit.modeling.quiet import quiet

    asked = cast("Learn", scene.asked)
    task.check()
    checkpoint = Checkpoint.open(scene.student)
    model = load_model(scene.student, "float32", place(scene.device), scene.trust_remote_code)
    names = names_of(model, checkpoint)
    data = gather(scene)
    method = GATES.get(asked.method)(**asked.knobs)
    n_train = max(asked.batch, math.ceil(method.share * len(data.train) / asked.batch) * asked.batch)
    data = replace(data, train=data.train[:n_train])
    for parameter in model.parameters():
        parameter.requires_grad_(method.trains_weights)
    gates = method.gates(task).to(model.device)
    gates.attach(model, task.view)
    of_gates = {id(parameter) for parameter in gates.parameters()}
    weights = [parameter for parameter in model.parameters() if id(parameter) not in of_gates]
    course, own = method.course(gates, task, weights)
    dynamic = is_dynamic(asked)
    objective = gates if dynamic else _Both(method.objective(scene, data.inputs), gates, own)
    settings = {**asked.model_dump(mode="json"), **asdict(method)}
    minutes = settings.pop("minutes", None)
    digests = {"cut_digest": scene.student_digest, "teacher_digest": scene.teacher_digest, "data_digest": data.digest}
    with working(work, {**settings, **digests}), quiet():
        told, _ = train(model, objective, data, scene, work, course)
    model.eval()
    if dynamic:
        return _foretelling(gates, model, data, asked, {**settings, "minutes": minutes, **told})
    gates.settle()
    chosen = gates.chosen
    rule = float(task.costs.left((gates.doubt() < 0).cpu().double()))
    length = next(iter(data.inputs.values())).shape[1]
    plan = plan_of(task, chosen.keep)
    tensors = folded(model, names, task, gates.fixed().cpu(), plan, checkpoint, method.trains_weights)
    about = {
        **settings,
        "minutes": minutes,
        **told,
        "tokens": told["steps_done"] * asked.batch * length,
        "trained_sequences": len(data.train),
        "held_out_sequences": len(data.held_out),
        "sequences_of": list(data.shares),
        "threshold": chosen.threshold,
        "removed": chosen.removed / task.whole,
        "removed_by_rule": (task.costs.before - rule) / task.whole,
        "changed_tensors": len(tensors),
        **gates.told(),
    }
    return Learned(plan, tensors, about)
