"""Routers that send each sequence to a few heads of every block, and the heads that their usage leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm
from torch.nn.utils import parametrize

from prunekit.gates._places import Place, attach_width
from prunekit.modeling.modeling_prunekit import blocks_of, output_projection

if TYPE_CHECKING:
    from prunekit.gates._select import Chooser, Chosen
    from prunekit.structure.view import ModelView

# What a head's mean probability counts beside its usage: it ranks heads that no sequence takes.
_SOFT = 1e-3
_TINY = 1e-12
_SPREAD = 0.02


class Routers(nn.Module):
    """One linear router a block, from the mean of what enters it over a sequence's tokens to a head each.

    In training each sequence passes the `top` heads of highest probability: their factor is 1, with the gradient of
    the probabilities (straight through); that of the others falls from 1 to 0 with `fade`, and protected ones keep 1.
    In evaluation the heads stay that the budget leaves by usage, with factor 1 for all sequences.

    Args:
        places: heads of all blocks, one after the other.
        chooser: decides what stays.
        hidden: width of the residual stream.
        top: heads that each sequence passes.
        shared: whether the heads of a block lead to the residual stream by one matrix.
        seed: of the initial weights.

    B: sequences, T: tokens, D: hidden width, H: heads of a block.
    """

    usage: Tensor
    chance: Tensor

    def __init__(
        self, places: Sequence[Place], chooser: Chooser, hidden: int, top: int, shared: bool, seed: int
    ) -> None:
        super().__init__()
        self._places, self._chooser = tuple(places), chooser
        self.top, self.shared, self.fade = top, shared, 0.0
        self._expanders: list[nn.Module] = []
        n = sum(len(place.units) for place in places)
        draw = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(_SPREAD * torch.randn(n, hidden, generator=draw))
        # Sequences that took a head, and the sum of its probabilities over all of them; kept in checkpoints.
        self.register_buffer("usage", torch.zeros(n))
        self.register_buffer("chance", torch.zeros(n))
        self.chosen: Chosen | None = None
        self._mask: Tensor | None = None
        self._routes: dict[int, Tensor] = {}
        self._balance: list[Tensor] = []

    def train(self, mode: bool = True) -> Routers:
        """In evaluation heads are chosen once, from how often each was taken so far."""
        super().train(mode)
        self.chosen = None if mode else self._chooser.choose(self.doubt())
        return self

    def doubt(self) -> Tensor:
        """How much less each head was taken than the `top` of its block, as a logarithm.

        0 lies half-way between the last of them and the next; above it a head goes.
        """
        found = torch.empty(len(self.usage), dtype=torch.float64)
        for place in self._places:
            taken = (self.usage + _SOFT * self.chance)[place.slice].cpu().double()
            log = (taken / taken.sum().clamp_min(_TINY) + _TINY).log()
            order = log.sort(descending=True).values
            # Where sequences take every head, none goes by this rule.
            below = order[self.top] if self.top < len(order) else order[-1] - 1
            found[place.slice] = (order[self.top - 1] + below) / 2 - log
        return found

    def fixed(self) -> Tensor:
        """Factor of every head once the choice is made, 1 or 0, float32.

        Raises:
            ValueError: in training.
        """
        if self.chosen is None:
            raise ValueError("the heads are chosen in evaluation only")
        return self.chosen.keep.to(self.weight)

    def factors(self, place: Place, like: Tensor) -> Tensor:
        """Factors of a block's heads: [B, 1, H] for activations [B, T, width], or [H] in evaluation."""
        if self.chosen is not None:
            return self.fixed()[place.slice].to(like)
        return self._routes.pop(place.begin)[:, None, :].to(like)

    def forget(self) -> None:
        """Counts usage anew."""
        self.usage.zero_()
        self.chance.zero_()

    def imbalance(self) -> Tensor:
        """Mean over the blocks passed since it was last asked of H sum(f P) / top: 1 where all heads are taken alike.

        f is the fraction of a batch's sequences that took a head, P its mean probability.

        Source:
            Switch Transformers, https://arxiv.org/abs/2101.03961, equation 4.
        """
        found = torch.stack(self._balance).mean()
        self._balance.clear()
        return found

    def attach(self, model: Any, view: ModelView) -> None:
        """Puts routers and factors into a model's forward, and itself among its parts, so that checkpoints hold it."""

        def masked(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._mask = kwargs.get("attention_mask")

        model.register_forward_pre_hook(masked, with_kwargs=True)
        for place in self._places:
            if self._chooser.safe[place.slice].all():
                continue
            _, number, kind = place.address.split(".")
            block = blocks_of(model)[int(number)]
            block.register_forward_pre_hook(partial(self._route, place), with_kwargs=True)
            attach_width(model, view, place, partial(self.factors, place))
            if self.shared:
                layer = output_projection(block, kind)
                width = layer.weight.shape[1] // len(place.units)
                parametrize.register_parametrization(layer, "weight", _Shared(width))
                self._expanders.append(layer)
        model.add_module("prunekit_gates", self)

    def settle(self) -> None:
        """Gives shared matrices back to the model as one of their product, as it is stored."""
        for layer in self._expanders:
            parametrize.remove_parametrizations(layer, "weight")

    def told(self) -> dict[str, Any]:
        """How many heads a sequence took, and how many sequences took each head, by block."""
        return {
            "top": self.top,
            "usage": {place.address: [int(n) for n in self.usage[place.slice].tolist()] for place in self._places},
        }

    def _route(self, place: Place, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.chosen is not None:
            return
        entered = args[0] if args else kwargs["hidden_states"]
        pooled = _pooled(entered.float(), self._mask)
        probabilities = (layer_norm(pooled, pooled.shape[-1:]) @ self.weight[place.slice].T).softmax(-1)
        taken = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(self.top, -1).indices, 1.0)
        with torch.no_grad():
            self.usage[place.slice] += taken.sum(0)
            self.chance[place.slice] += probabilities.sum(0)
        self._balance.append(len(place.units) / self.top * (taken.mean(0) * probabilities.mean(0)).sum())
        straight = taken + probabilities - probabilities.detach()
        faded = 1 - self.fade + self.fade * straight
        self._routes[place.begin] = faded.masked_fill(self._chooser.safe[place.slice].to(faded.device), 1.0)


class _Shared(nn.Module):
    """An output matrix [D, H W] as one matrix of all heads [D, W] times a small one of each [W, H W].

    It begins as the nearest of that form.

    Args:
        width: of a head, W.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, up: Tensor, inner: Tensor) -> Tensor:
        return up @ inner

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        up = torch.linalg.svd(weight, full_matrices=False).U[:, : self.width].contiguous()
        return up, up.T @ weight


def _pooled(entered: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens that are no padding: [B, T, D] to [B, D]."""
    if mask is None:
        return entered.mean(1)
    weight = mask[..., None].to(entered)
    return (entered * weight).sum(1) / weight.sum(1).clamp_min(1)


def heads_left(places: Sequence[Place], chooser: Chooser) -> int:
    """Heads that a budget leaves in each block where all lose alike, at least 1."""
    doubt = torch.cat([torch.arange(len(place.units), dtype=torch.float64) for place in places])
    keep = chooser.choose(doubt).keep
    return min(int(keep[place.slice].sum()) for place in places)
