"""How far the outputs of a cut model are from those of the dense one, position by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

_LN2 = math.log(2)
# Elementwise work on a CPU is done on so much at a time: at 49,152 words two positions stay in a 2 MiB cache, and
# Jensen-Shannon takes 48 ms for 256 positions instead of 173 ms in one go.
_CACHE_BYTES = 512 * 2**10


@dataclass(frozen=True)
class Distance:
    """One way to compare outputs.

    Args:
        each: (reference, output) -> float [positions]; both [positions, width], the output may be overwritten. The
            reference is what `prepare` makes.
        probabilities: outputs are logits, and their softmax is compared.
        growth: how the distance grows while far-apart sub-layers go one by one: `even`, `ceiling` (the same, but
            slowing down towards log 2) or `root` (its square grows evenly, as with lengths and angles).
        by_sequence: the root of the sum over a sequence, averaged over sequences; else the mean over positions.
        text: outputs are compared with the next token of the text, not with the dense model's.
    """

    each: Callable[[Tensor, Tensor], Tensor]
    probabilities: bool
    growth: Literal["even", "ceiling", "root"]
    by_sequence: bool = False
    text: bool = False

    def evened(self, value: float) -> float:
        """The distance on a scale where changes made by far-apart sub-layers add up, roughly."""
        if self.growth == "ceiling":
            return -math.log1p(-min(value / _LN2, 1 - 1e-9))
        return value * value if self.growth == "root" else value

    def from_evened(self, value: float) -> float:
        """The distance at a place of that scale."""
        if self.growth == "ceiling":
            return -_LN2 * math.expm1(-value)
        return math.sqrt(max(value, 0.0)) if self.growth == "root" else value

    def prepare(self, output: Tensor, following: Tensor | None = None) -> Tensor:
        """Outputs of the dense model as `each` wants them, at least float32.

        Args:
            output: [positions, width].
            following: int64 [positions], the token that the text has next, -1 where it has none; for `text` only.
        Returns:
            Log-probabilities where `probabilities`, else the outputs; for `text` [positions, 2]: token and loss.
        """
        wide = _wide(output)
        if following is not None:
            return torch.stack([following.to(wide.dtype), _next_token_loss(following, wide)], dim=-1)
        return wide.log_softmax(-1) if self.probabilities else wide

    def values(self, reference: Tensor, output: Tensor) -> Tensor:
        """Distance at every position, float32 (float64 for float64 outputs) [positions].

        Args:
            reference: what `prepare` made of the same positions.
            output: of the cut model [positions, width].
        """
        if output.device.type != "cpu":
            return self.each(reference, _wide(output))
        rows = max(1, _CACHE_BYTES // (4 * output.shape[-1]))
        parts = zip(reference.split(rows), output.split(rows), strict=True)
        return torch.cat([self.each(one, _wide(other)) for one, other in parts])

    def total(self, values: Tensor, lengths: Sequence[int]) -> tuple[Tensor, int]:
        """Sum and count whose quotient is the distance, so that batches add up.

        Args:
            values: [..., positions].
            lengths: positions of each sequence.
        Returns:
            Float64 [...], and the count.
        """
        wide = values.double()
        if not self.by_sequence:
            return wide.sum(-1), values.shape[-1]
        roots = [part.sum(-1).sqrt() for part in wide.split(list(lengths), dim=-1)]
        return torch.stack(roots).sum(0), len(lengths)


def _wide(output: Tensor) -> Tensor:
    return output if output.dtype == torch.float64 else output.float()


def _next_token_loss(following: Tensor, output: Tensor) -> Tensor:
    return cross_entropy(output, following, ignore_index=-1, reduction="none")


def _loss(reference: Tensor, output: Tensor) -> Tensor:
    return _next_token_loss(reference[:, 0].long(), output) - reference[:, 1]


def _squared(reference: Tensor, output: Tensor) -> Tensor:
    return (reference - output).square_().sum(-1)


def _angle(reference: Tensor, output: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(reference, dim=-1) * torch.linalg.vector_norm(output, dim=-1)
    return (torch.linalg.vecdot(reference, output) / length).clamp_(0, 1).acos_()


def _kl(reference: Tensor, output: Tensor) -> Tensor:
    return (reference - output.log_softmax(-1)).mul_(reference.exp()).sum(-1)


def _middle(one: Tensor, other: Tensor) -> Tensor:
    """Probabilities half-way between; the smallest number stands for zero, so that its logarithm is finite."""
    return (one + other).mul_(0.5).clamp_(min=torch.finfo(one.dtype).tiny)


def _js(reference: Tensor, output: Tensor) -> Tensor:
    logs = output.log_softmax(-1)
    dense, cut = reference.exp(), logs.exp()
    middle = _middle(dense, cut).log_()
    left = (reference - middle).mul_(dense).sum(-1)
    return logs.sub_(middle).mul_(cut).sum(-1).add_(left).mul_(0.5)


def _js_released(reference: Tensor, output: Tensor) -> Tensor:
    logs = output.log_softmax(-1)
    middle = _middle(reference.exp(), logs.exp())
    # KL(M || P) + KL(M || Q) = sum of M (2 log M - log P - log Q).
    return middle.log().mul_(2).sub_(reference).sub_(logs).mul_(middle).sum(-1).mul_(0.5)


DISTANCES: dict[str, Distance] = {
    "js": Distance(_js, probabilities=True, growth="ceiling"),
    "js_released": Distance(_js_released, probabilities=True, growth="even"),
    "kl": Distance(_kl, probabilities=True, growth="even"),
    "loss": Distance(_loss, probabilities=True, growth="even", text=True),
    "angular": Distance(_angle, probabilities=False, growth="root"),
    "norm": Distance(_squared, probabilities=False, growth="root", by_sequence=True),
}
