"""Gates of the variational information bottleneck: noise, a bound on information, and the size they expect."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.gates._places import Place, attach
from prunekit.structure.parts import HIDDEN

if TYPE_CHECKING:
    from prunekit.gates._costs import Costs
    from prunekit.gates._select import Chooser, Chosen
    from prunekit.structure.view import ModelView

# As in the published code, a guard against division.
_TINY = 1e-8
# How sharply a hidden channel leaves the layer norms as its noise passes its signal.
_SHARP = 10.0
_SPREAD = 0.01


class Gates(nn.Module):
    """One Gaussian factor a unit, N(mu, sigma^2), drawn anew for every token.

    In evaluation a unit's factor is mu where it stays and 0 where it goes, as the budget would choose now. In post-norm
    models no weight can hold the factor of a whole sub-layer; there it is 1 with noise sigma / mu, and 1 in evaluation.

    Args:
        places: units of all places, one after the other.
        costs: of the same places.
        chooser: decides what stays.
        start: initial log sigma^2.
        seed: of the initial values.
        of_one: for each place, whether its factor is 1 on average.
    """

    def __init__(
        self,
        places: Sequence[Place],
        costs: Costs,
        chooser: Chooser,
        start: float,
        seed: int,
        of_one: Sequence[bool],
    ) -> None:
        super().__init__()
        self._places, self._costs, self._chooser = tuple(places), costs, chooser
        n = sum(len(place.units) for place in places)
        draw = torch.Generator().manual_seed(seed)
        self.mu = nn.Parameter(1 + _SPREAD * torch.randn(n, generator=draw))
        self.log_variance = nn.Parameter(start + _SPREAD * torch.randn(n, generator=draw))
        self.multipliers = nn.Parameter(torch.zeros(2))
        self._one = torch.zeros(n, dtype=torch.bool)
        for place, one in zip(places, of_one, strict=True):
            self._one[place.slice] = one
        self.chosen: Chosen | None = None

    def train(self, mode: bool = True) -> Gates:
        """In evaluation the units are chosen once, from what is learned so far."""
        super().train(mode)
        self.chosen = None if mode else self._chooser.choose(self.doubt())
        return self

    def factors(self, place: Place, like: Tensor) -> Tensor:
        """Factors of a place's units for activations [..., width]: [..., units], or [units] in evaluation."""
        here = place.slice
        if self.chosen is not None:
            return self.fixed()[here].to(like)
        mu, spread = self.mu[here], (0.5 * self.log_variance[here]).exp()
        noise = torch.randn((*like.shape[:-1], len(place.units)), device=mu.device)
        one = bool(self._one[place.begin])
        return (1 + noise * spread / (mu.abs() + _TINY) if one else mu + noise * spread).to(like.dtype)

    def kept(self, place: Place) -> Tensor:
        """How much of each of a place's units counts as kept, 0 to 1 [units], no gradient."""
        here = place.slice
        if self.chosen is not None:
            return self.chosen.keep[here].to(self.mu)
        return torch.sigmoid(-_SHARP * self.doubt()[here].detach())

    def fixed(self) -> Tensor:
        """Factor of every unit once the choice is made, float32, no gradient."""
        if self.chosen is None:
            raise ValueError("the units are chosen in evaluation only")
        mu = self.mu.detach().masked_fill(self._one.to(self.mu.device), 1.0)
        return mu * self.chosen.keep.to(mu)

    def doubt(self) -> Tensor:
        """log(sigma^2 / mu^2) of every unit; above 0 there is more noise than signal."""
        return self.log_variance - (self.mu.square() + _TINY).log()

    def information(self, weights: Tensor) -> Tensor:
        """Sum over units of weight times 0.5 ln(1 + mu^2 / sigma^2), in nats.

        Source:
            Compressing Neural Networks using the Variational Information Bottleneck,
            https://arxiv.org/abs/1802.10399, equation 8.
        """
        return 0.5 * (weights * torch.log1p(self.mu.square() / (self.log_variance.exp() + _TINY))).sum()

    def removed(self, steepness: float) -> Tensor:
        """Cost that goes, each unit counting as left by sigmoid(-steepness log alpha), float64."""
        kept = torch.sigmoid(-steepness * self.doubt()).cpu().double()
        return self._costs.before - self._costs.left(kept)

    def settle(self) -> None:
        """Nothing: no weight of the model has another form in training."""

    def told(self) -> dict[str, Any]:
        """Nothing beside what every method says of itself."""
        return {}

    def attach(self, model: Any, view: ModelView) -> None:
        """Puts every gate into a model's forward, and itself among the model's parts, so that checkpoints hold it."""
        # A whole sub-layer's gate acts on what the gates of hidden channels leave.
        for place in sorted(self._places, key=lambda place: place.kind != HIDDEN):
            attach(model, view, place, partial(self.factors, place), partial(self.kept, place))
        model.add_module("prunekit_gates", self)
