"""Mean angle between the residual stream at any two block boundaries, at each sequence's last token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Angle:
    """Angular distance arccos(cos)/pi between block boundaries, averaged over sequences.

    Key: `angle/blocks`, float32 [blocks + 1, blocks + 1], symmetric, in [0, 1]; boundary i is the input of block i in
    execution order, the last one the output of the last block. Memory: that matrix, and one vector for each boundary
    and sequence of the running batch.
    """

    point: ClassVar[Literal["residual"]] = "residual"

    def __init__(self) -> None:
        self._boundaries: list[Tensor] = []
        self._sum: Tensor | None = None
        self._count = 0

    def update(self, address: str, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        """Takes in one unit; see `Observer`."""
        if address.count(".") != 1:
            return
        if not self._boundaries:
            self._boundaries.append(_last(before, mask))
        self._boundaries.append(_last(after, mask))

    def flush(self) -> None:
        """Adds the running batch's sequences to the sum."""
        if not self._boundaries:
            return
        unit = normalize(torch.stack(self._boundaries, dim=1).double(), dim=-1)
        angles = torch.acos((unit @ unit.transpose(1, 2)).clamp(-1.0, 1.0)) / math.pi
        self._add(angles.sum(dim=0).cpu(), angles.shape[0])
        self._boundaries = []

    def sums(self) -> dict[str, Tensor]:
        """Sums and count; see `Observer`."""
        return {} if self._sum is None else {"angles": self._sum, "count": torch.tensor(self._count)}

    def merge(self, sums: Mapping[str, Tensor]) -> None:
        """Takes in another observer's sums."""
        if sums:
            self._add(sums["angles"], int(sums["count"]))

    def value(self) -> dict[str, Tensor]:
        """The mean by key."""
        if self._sum is None:
            return {}
        mean = (self._sum / self._count).float()
        return {"angle/blocks": mean.fill_diagonal_(0.0)}

    def _add(self, angles: Tensor, count: int) -> None:
        self._sum = angles if self._sum is None else self._sum + angles
        self._count += count


def _last(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Hidden state of each sequence's last token that is not padding [sequences, hidden]."""
    if mask is None:
        return hidden[:, -1]
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    last = (mask.to(hidden.device).bool() * positions).amax(dim=1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
