"""Mean, mean square and mean size of what enters the output projection of each sub-layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

_MOMENTS = ("mean", "square", "size")


class Projection:
    """Moments of every channel that enters an output projection, over all tokens that are not padding.

    Keys: `projection/mean/<address>`, `projection/square/<address>` and `projection/size/<address>`, the mean absolute
    value, for every sub-layer, float32 [width]; width is heads times head width for attention, neurons for an FFN.
    """

    point: ClassVar[Literal["projection"]] = "projection"

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, address: str, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        """Takes in one sub-layer; see `Observer`."""
        rows = before.flatten(0, -2) if mask is None else before[mask.to(before.device).bool()]
        wide = rows.double()
        self._add(address, torch.stack([wide.sum(0), wide.square().sum(0), wide.abs().sum(0)]).cpu(), rows.shape[0])

    def flush(self) -> None:
        """Nothing to do: tokens are independent of each other."""

    def sums(self) -> dict[str, Tensor]:
        """Sums and count by address; see `Observer`."""
        found: dict[str, Tensor] = {}
        for address, sums in self._sums.items():
            found |= {f"sums/{address}": sums, f"count/{address}": torch.tensor(self._counts[address])}
        return found

    def merge(self, sums: Mapping[str, Tensor]) -> None:
        """Takes in another observer's sums."""
        for key, value in sums.items():
            what, _, address = key.partition("/")
            if what == "sums":
                self._add(address, value, int(sums[f"count/{address}"]))

    def value(self) -> dict[str, Tensor]:
        """The moments by key."""
        found: dict[str, Tensor] = {}
        for address, sums in self._sums.items():
            for name, value in zip(_MOMENTS, (sums / max(1, self._counts[address])).float(), strict=True):
                found[f"projection/{name}/{address}"] = value
        return found

    def _add(self, address: str, sums: Tensor, count: int) -> None:
        self._sums[address] = self._sums[address] + sums if address in self._sums else sums
        self._counts[address] = self._counts.get(address, 0) + count
