"""Distillation: the cut model learns to say what the dense one says."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from prunekit.heal.scene import Objective, Scene


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Distill:
    """Trains the cut model on the dense model's distribution over the next token.

    The loss is (1 - cross_entropy) KL(teacher || student) + cross_entropy CE + hidden E + relations R: the divergence
    at a temperature, times its square; the cross entropy of the text; the relative error of each surviving block's
    output against that of the dense block before the next survivor; and the divergence between attention relations
    (how alike tokens are as queries, as keys and as values) in the last attention of both. A text encoder has no next
    token and learns the last hidden states, by the same relative error.

    Args:
        temperature: what logits of both are divided by before the softmax.
        cross_entropy: weight of the text itself, 0 to 1; the divergence has the rest.
        hidden: weight of the blocks' outputs; needs the dense model at every step.
        relations: weight of the attention relations; needs the dense model at every step. Heads may have been removed.
        top_k: keep the teacher's so many most likely tokens on disk and count the others as one, instead of running it
            at every step; the divergence becomes a lower bound of the full one. null runs the teacher.
    """

    temperature: float = Field(default=1.0, gt=0)
    cross_entropy: float = Field(default=0.0, ge=0, le=1)
    hidden: float = Field(default=0.0, ge=0)
    relations: float = Field(default=0.0, ge=0)
    top_k: int | None = Field(default=None, ge=1)

    needs: ClassVar[tuple[str, ...]] = ("teacher",)
    paper: ClassVar[str] = "Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531"
    evidence: ClassVar[str] = "text; attention relations recalled from MiniLMv2 (https://arxiv.org/abs/2012.15828)"
    deviations: ClassVar[str] = (
        "the student is the pruned teacher; weights of the two losses sum to one; block outputs, attention relations "
        "and top-k targets are additions; as many relation heads as divide the heads of both models, queries and keys "
        "as attention gets them, positions included, and in models that write text with the tokens before alone"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"top_k": 64}

    @model_validator(mode="after")
    def _together(self) -> Distill:
        if self.hidden and self.top_k is not None:
            raise ValueError("`hidden` and `top_k` exclude each other: block outputs are not kept on disk")
        if self.relations and self.top_k is not None:
            raise ValueError("`relations` and `top_k` exclude each other: attention is not kept on disk")
        return self

    def check(self, decoder: bool) -> None:
        """Fails for what a text encoder cannot learn.

        Args:
            decoder: whether the model writes text.
        Raises:
            UsageError: naming the knob.
        """
        for name in ("cross_entropy", "top_k"):
            if getattr(self, name) and not decoder:
                raise UsageError(
                    f"`heal.{name}` needs a model that writes text", why="a text encoder learns hidden states alone"
                )

    def objective(self, scene: Scene, data: Mapping[str, Tensor]) -> Objective:
        """The loss.

        Args:
            scene: student and teacher.
            data: all rows of the training data by input name.
        Raises:
            UsageError: if nobody knows which blocks belong together.
        """
        if self.hidden and scene.matches is None:
            raise UsageError(
                "`heal.hidden` needs to know which blocks were removed",
                why="the folder holds no `prunekit.json` with a plan for this teacher",
                hint="leave `hidden` out",
            )
        return _Objective(self, scene, data)


class _Objective:
    of_tokens = True

    def __init__(self, knobs: Distill, scene: Scene, data: Mapping[str, Tensor]) -> None:
        import torch

        from prunekit.heal import _losses as losses
        from prunekit.heal._relations import Ear
        from prunekit.heal._teacher import Online, cached

        self.ears = (Ear(), Ear())
        self.knobs, self.decoder, self.matches = knobs, scene.decoder, scene.matches or ()
        self.teacher = None
        # Learned masks are trained by the same objective and are not compiled.
        self.kl = torch.compile(losses.kl) if getattr(scene.asked, "compile", False) else losses.kl
        self.hidden_states = bool(knobs.hidden) or not scene.decoder
        if knobs.top_k is not None:
            self.cached = cached(scene, data["input_ids"], knobs.top_k, knobs.temperature)
        else:
            options = {"output_hidden_states": self.hidden_states, **scene.no_cache}
            self.online = Online(scene.load_teacher(), options)
            self.teacher = self.online.model

    def listening(self, model: Any) -> AbstractContextManager[None]:
        """Meanwhile what attention reads in both models is seen, where relations are learned."""
        from prunekit.heal._relations import listening

        return listening(model, self.teacher, *self.ears) if self.knobs.relations else nullcontext()

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        theirs = self.online(inputs) if self.knobs.top_k is None else None
        if self.decoder:
            loss = self._next_token(outputs, theirs, inputs, rows)
        else:
            loss = self._last_hidden(outputs, theirs, inputs)
        return loss + self.knobs.relations * self._relations(inputs) if self.knobs.relations else loss

    def _relations(self, inputs: Mapping[str, Tensor]) -> Tensor:
        from prunekit.heal._relations import relation_error

        ours, dense = (ear.take() for ear in self.ears)
        return relation_error(ours, dense, None if self.decoder else inputs["attention_mask"])

    def _next_token(self, outputs: Any, theirs: Any, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        from prunekit.heal import _losses as losses

        knobs, logits = self.knobs, outputs.logits
        if theirs is None:
            known = self.cached(rows)
            target = losses.Top(known.log_probs.to(logits.device), known.tokens.to(logits.device))
            loss = losses.kl_of_top(logits, target, knobs.temperature)
        else:
            loss = self.kl(logits, theirs.logits, knobs.temperature)
        if knobs.cross_entropy:
            text = losses.next_token(logits, inputs["input_ids"])
            loss = (1 - knobs.cross_entropy) * loss + knobs.cross_entropy * text
        return loss + knobs.hidden * self._blocks(outputs, theirs, None) if knobs.hidden else loss

    def _last_hidden(self, outputs: Any, theirs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        from prunekit.heal._losses import hidden_error

        mask = inputs["attention_mask"]
        loss = hidden_error(outputs.hidden_states[-1], theirs.hidden_states[-1], mask)
        return loss + self.knobs.hidden * self._blocks(outputs, theirs, mask) if self.knobs.hidden else loss

    def _blocks(self, outputs: Any, theirs: Any, mask: Tensor | None) -> Tensor:
        """Relative error of the blocks' outputs, mean over blocks; number 0 of the hidden states is what enters."""
        import torch

        from prunekit.heal._losses import hidden_error

        ours, dense = outputs.hidden_states[1:], theirs.hidden_states[1:]
        pairs = zip(ours, self.matches, strict=True)
        return torch.stack([hidden_error(state, dense[number], mask) for state, number in pairs]).mean()
