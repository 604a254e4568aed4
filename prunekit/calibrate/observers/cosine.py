"""Mean cosine between the hidden states that enter a unit and those that leave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity


class Cosine:
    """Cosine of each token's hidden state before and after a unit, averaged over all tokens that are not padding.

    Keys: `cosine/<address>` for every block and sub-layer, float32 scalars in [-1, 1].
    """

    point: ClassVar[Literal["residual"]] = "residual"

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def update(self, address: str, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        """Takes in one unit; see `Observer`."""
        cosines = cosine_similarity(before.float(), after.float(), dim=-1)
        if mask is not None:
            cosines = cosines[mask.to(cosines.device).bool()]
        self._sums[address] = self._sums.get(address, 0.0) + float(cosines.double().sum())
        self._counts[address] = self._counts.get(address, 0) + cosines.numel()

    def flush(self) -> None:
        """Nothing to do: tokens are independent of each other."""

    def sums(self) -> dict[str, Tensor]:
        """Sum and count by address; see `Observer`."""
        return {
            address: torch.tensor([total, self._counts[address]], dtype=torch.float64)
            for address, total in self._sums.items()
        }

    def merge(self, sums: Mapping[str, Tensor]) -> None:
        """Takes in another observer's sums."""
        for address, pair in sums.items():
            total, count = pair.tolist()
            self._sums[address] = self._sums.get(address, 0.0) + total
            self._counts[address] = self._counts.get(address, 0) + int(count)

    def value(self) -> dict[str, Tensor]:
        """The mean by key."""
        means = {address: total / max(1, self._counts[address]) for address, total in self._sums.items()}
        return {f"cosine/{address}": torch.tensor(mean, dtype=torch.float32) for address, mean in means.items()}
