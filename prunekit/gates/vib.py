"""VTrans: masks learned through a variational information bottleneck."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.gates._learn import Task
    from prunekit.gates._vib import Gates
    from prunekit.heal._loop import Course
    from prunekit.heal.scene import Objective, Scene


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Vib:
    """Learns a noisy factor for every unit and removes those whose noise drowns what they say.

    Each factor is drawn from N(mu, sigma^2) for every token. The loss is the task's, plus `kl` times the information
    that passes the gates, sum of 0.5 ln(1 + mu^2 / sigma^2), plus lambda1 (s - t) + lambda2 (s - t)^2, where s is the
    fraction removed by soft counts sigmoid(steepness log(mu^2 / sigma^2)), t rises to the budget, and both lambda are
    learned by gradient ascent. A unit stays iff mu^2 > sigma^2; its mu is folded into the matrix that it leads to.
    Where that rule misses the budget the threshold moves until it is met, and the result says where it lies and what
    the rule alone would remove. The held-out loss is that of the model that would be cut now, so the checkpoint with
    the lowest is the best cut.

    The task is what the dense model says (`distill`, see the method of that name under healing) and for the rest the
    next token of the text; text encoders learn the dense model's last hidden states.

    Args:
        variant: `full` trains weights (at `lr`) and gates on all the data; `fast` the same on 3 % of the sequences;
            `faster` trains gates alone, weights stay.
        distill: weight of the dense model's distribution, 0 to 1; the text has the rest.
        kl: weight of the information.
        kl_heads: how many times a head, KV group or sub-layer counts there beside a neuron or a hidden channel.
        gate_lr: peak learning rate of mu and log sigma^2.
        multiplier_lr: of both lambda.
        target_warm_up: fraction of the steps in which the target rises to the budget.
        steepness: of the soft counts at the last step; it rises from 1 at the first.
        start: initial log sigma^2; nearer to 0 needs fewer steps until units compete.
    """

    variant: Literal["full", "fast", "faster"] = "faster"
    distill: float = Field(default=1.0, ge=0, le=1)
    kl: float = Field(default=1e-6, ge=0)
    kl_heads: float = Field(default=256.0, gt=0)
    gate_lr: float = Field(default=0.1, gt=0)
    multiplier_lr: float = Field(default=1.0, gt=0)
    target_warm_up: float = Field(default=0.1, ge=0, le=1)
    steepness: float = Field(default=10.0, ge=1)
    start: float = Field(default=-5.0, le=0)

    kinds: ClassVar[tuple[str, ...]] = (
        "neurons",
        "kv_groups",
        "query_heads",
        "sublayers",
        "attention",
        "ffn",
        "hidden",
    )
    needs: ClassVar[tuple[str, ...]] = ("teacher", "text")
    paper: ClassVar[str] = (
        "VTrans: Accelerating Transformer Compression with Variational Information Bottleneck based Pruning, "
        "https://arxiv.org/abs/2406.05276"
    )
    evidence: ClassVar[str] = (
        "code: gate, KL, budget and defaults as in TVA-Prune, the same authors' method for language models; "
        "text: abstract for the fast and faster variants"
    )
    deviations: ClassVar[str] = (
        "made for hundreds of steps where the published script takes 4,000: soft counts begin flat and get steep, "
        "start is -5 (published -9), gate_lr 0.1 (0.05), multiplier_lr 1 (0.1); the threshold moves where the learned "
        "one misses the budget; distillation is the task by default; whole sub-layers have gates of their own, in "
        "post-norm models with mean 1, and weigh in the information like heads; layer norms count hidden channels as "
        "much as they are kept, and post-norm models have those gates behind their norms; the budget is of what the "
        "blocks held before any cut"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"variant": "faster", "gate_lr": 0.1}

    def check(self, decoder: bool) -> None:
        """Fails for what a text encoder cannot learn.

        Args:
            decoder: whether the model writes text.
        Raises:
            UsageError: if text is a part of the loss of a model that writes none.
        """
        from prunekit.core.errors import UsageError

        if not decoder and self.distill < 1:
            why = "a text encoder learns the dense model's hidden states alone"
            raise UsageError(f"`learn.distill: {self.distill:g}` needs a model that writes text", why=why)

    @property
    def trains_weights(self) -> bool:
        """Whether weights are trained beside gates."""
        return self.variant != "faster"

    @property
    def share(self) -> float:
        """Fraction of the sequences that is trained on."""
        return 0.03 if self.variant == "fast" else 1.0

    def gates(self, task: Task) -> Gates:
        """Gates for all units of a task."""
        from prunekit.gates._vib import Gates

        of_one = [not place.axis and task.view.norm == "post" for place in task.places]
        return Gates(task.places, task.costs, task.chooser, self.start, task.asked.seed, of_one)

    def course(self, gates: Gates, task: Task, weights: list[Any]) -> tuple[Course, Loss]:
        """Optimizer groups, and the loss beside the task's.

        Args:
            gates: on their device.
            task: what is learned.
            weights: the model's own parameters.
        """
        from prunekit.heal._loop import Course

        groups: list[dict[str, Any]] = [
            {"params": [gates.mu, gates.log_variance], "lr": self.gate_lr, "weight_decay": 0.0},
            {"params": [gates.multipliers], "lr": self.multiplier_lr, "weight_decay": 0.0, "maximize": True},
        ]
        if self.trains_weights:
            groups.append({"params": weights, "lr": task.asked.lr})
        loss = Loss(self, gates, task)
        return Course("learning masks", groups, loss.at_step, "`learn.gate_lr`, "), loss

    def objective(self, scene: Scene, data: Mapping[str, Tensor]) -> Objective:
        """The task's loss."""
        from prunekit.heal.methods.distill import Distill
        from prunekit.heal.methods.finetune import Finetune

        if not self.distill:
            return Finetune().objective(scene, data)
        return Distill(cross_entropy=1 - self.distill).objective(scene, data)


class Loss:
    """Information and budget, the part of the loss that the task does not know.

    Args:
        knobs: weights.
        gates: what is trained.
        task: budget and steps.
    """

    def __init__(self, knobs: Vib, gates: Gates, task: Task) -> None:
        import torch

        self.knobs, self.gates, self.task, self.done = knobs, gates, task, 0
        weights = [1.0 if place.kind in ("neurons", "hidden") else knobs.kl_heads for place in task.places]
        sizes = torch.tensor([len(place.units) for place in task.places])
        self.weights = torch.tensor(weights).repeat_interleave(sizes).to(gates.mu.device)

    def at_step(self, step: int) -> None:
        """Says how many steps are done."""
        self.done = step

    def __call__(self) -> Tensor:
        """The terms, a scalar."""
        knobs, task = self.knobs, self.task
        rising = max(1.0, knobs.target_warm_up * task.asked.steps)
        target = min(1.0, (self.done + 1) / rising) * task.goal / task.whole
        # From 1 on, geometrically: a steep count has no gradient at the units that are far from the threshold yet.
        steepness = knobs.steepness ** min(1.0, self.done / max(1, task.asked.steps - 1))
        beyond = self.gates.removed(steepness) / task.whole - target
        one, two = self.gates.multipliers.cpu().double()
        budget = (one * beyond + two * beyond.square()).to(self.gates.mu)
        return knobs.kl * self.gates.information(self.weights) + budget
