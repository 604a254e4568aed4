"""SHRP: heads as experts that sequences are routed to; those that are used stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.gates._learn import Task
    from prunekit.gates._shrp import Routers
    from prunekit.heal._loop import Course
    from prunekit.heal.scene import Objective, Scene


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Shrp:
    """Routes every sequence of a text encoder to a few heads of each block and removes the heads that are used least.

    In training each head of a block is an expert. A router, linear in the mean of what enters the block, sends each
    sequence to the `top` heads of highest probability. The loss is that of the dense model's last hidden states, and in
    the first stage `balance` times the mean over blocks of H sum(f P) / top, with f the fraction of sequences that take
    a head, P its mean probability and H heads; in that stage the heads not taken fade from 1 to 0. In the second stage
    nothing balances, routers specialise, and usage is counted: the number of sequences that took a head. Heads with the
    least go until the budget is met, at least one stays in each block, and what stays is static: no router is left.
    Weights are trained all along. Behind the heads lies one expander for all of them: the block's FFN, and with
    `expander: shared` one output matrix of a head's width before it, which begins as the best one of that rank.

    Narrow the FFN, as a lighter expander, by a step before: `remove: neurons`.

    Args:
        top: heads that each sequence takes; null takes as many as the budget leaves each block.
        expander: `own` leaves each head its part of the output matrix; `shared` lets them share one.
        balanced: fraction of the steps that the first stage takes.
        balance: weight of the balance.
        router_lr: peak learning rate of the routers.
    """

    top: int | None = Field(default=None, ge=1)
    expander: Literal["own", "shared"] = "own"
    balanced: float = Field(default=0.5, gt=0, lt=1)
    balance: float = Field(default=0.01, ge=0)
    router_lr: float = Field(default=1e-3, gt=0)

    kinds: ClassVar[tuple[str, ...]] = ("kv_groups",)
    needs: ClassVar[tuple[str, ...]] = ("teacher", "text")
    paper: ClassVar[str] = (
        "SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression, https://arxiv.org/abs/2512.20635"
    )
    evidence: ClassVar[str] = (
        "inferred: the paper's text could not be had. Its abstract says that heads are experts, that a lightweight FFN "
        "shared by all of them (expander) refines their outputs, and that one Top-1 usage drives routing in training "
        "and pruning to a static model; an earlier abstract of the authors, that training balances load first and "
        "specialises then. All formulas here are our reading; what it is worth is measured in docs/results/encoders.md"
    )
    deviations: ClassVar[str] = (
        "unknown where the paper's text is. By our choice: a router a block, once a sequence; straight-through "
        "gradients; heads fade in the first stage; more than one head stays where the budget leaves more; the budget "
        "decides how many heads go over all blocks; the block's own FFN is the expander, with its residual sum and "
        "norms, and by default heads keep their parts of the output matrix; the task is the dense model's hidden "
        "states, not a labelled one. The paper's figures (BERT-base on GLUE: 48 % fewer parameters at 93 % of the "
        "accuracy) are not reproduced"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"top": 1}

    trains_weights: ClassVar[bool] = True
    share: ClassVar[float] = 1.0

    def check(self, decoder: bool) -> None:
        """Fails for a model that writes text.

        Args:
            decoder: whether the model writes text.
        Raises:
            UsageError: if it does.
        """
        if decoder:
            raise UsageError(
                "`learn.method: shrp` needs a text encoder",
                why="a head is chosen from all tokens of a sequence, which a model that writes text has not yet",
                hint="use `method: vib`",
            )

    def gates(self, task: Task) -> Routers:
        """Routers for the heads of a task.

        Raises:
            UsageError: if `top` exceeds the heads of a block.
        """
        from prunekit.gates._shrp import Routers, heads_left

        fewest = min(task.places, key=lambda place: len(place.units))
        top = self.top or heads_left(task.places, task.chooser)
        if top > len(fewest.units):
            raise UsageError(
                f"`learn.top: {top}` exceeds the {len(fewest.units)} heads of `{fewest.address}`",
                hint="lower it, or leave it out",
            )
        return Routers(task.places, task.chooser, task.view.hidden, top, self.expander == "shared", task.asked.seed)

    def course(self, gates: Routers, task: Task, weights: list[Any]) -> tuple[Course, Loss]:
        """Optimizer groups, and the loss beside the task's.

        Args:
            gates: on their device.
            task: what is learned.
            weights: the model's own parameters.
        """
        from prunekit.heal._loop import Course

        groups: list[dict[str, Any]] = [
            {"params": weights, "lr": task.asked.lr},
            {"params": [gates.weight], "lr": self.router_lr, "weight_decay": 0.0},
        ]
        loss = Loss(self, gates, task.asked.steps)
        return Course("learning usage", groups, loss.at_step, "`learn.router_lr`, "), loss

    def objective(self, scene: Scene, data: Mapping[str, Tensor]) -> Objective:
        """The task's loss."""
        from prunekit.heal.methods.distill import Distill

        return Distill().objective(scene, data)


class Loss:
    """Balance of the first stage, and when the second begins.

    Args:
        knobs: weight and length of the first stage.
        gates: what is trained.
        steps: of the training.
    """

    def __init__(self, knobs: Shrp, gates: Routers, steps: int) -> None:
        self.knobs, self.gates = knobs, gates
        self.n_balanced = max(1, round(knobs.balanced * steps))
        self.weight = knobs.balance

    def at_step(self, step: int) -> None:
        """Says how many steps are done."""
        self.gates.fade = min(1.0, (step + 1) / self.n_balanced)
        self.weight = self.knobs.balance if step < self.n_balanced else 0.0
        if step == self.n_balanced:
            self.gates.forget()

    def __call__(self) -> Tensor:
        """The term, a scalar."""
        return self.weight * self.gates.imbalance()
