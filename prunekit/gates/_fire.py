"""Predictors while they learn: what a sub-layer reads, which of its units answer, and how well that is foretold.

B: sequences, T: tokens, D: width of the residual stream, C: channels of a sub-layer's units, U: units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from prunekit.gates._places import Place, channel_units
from prunekit.modeling.dynamic import Predictor, require_dynamic
from prunekit.modeling.modeling_prunekit import blocks_of, output_projection, projections

if TYPE_CHECKING:
    from prunekit.gates._learn import Task
    from prunekit.gates.fire_together import FireTogether
    from prunekit.heal._data import Data
    from prunekit.structure.view import ModelView


def by_mass(response: Tensor, mass: float) -> Tensor:
    """Units whose responses, greatest first, sum to at most a fraction of all: bool [B, U], the greatest always.

    Responses 4 3 2 1 with mass 0.8: 4 + 3 = 0.7 of 10 stay, the unit that crosses goes.
    """
    values, order = response.sort(-1, descending=True)
    within = values.cumsum(-1) <= mass * values.sum(-1, keepdim=True)
    within[:, 0] = True
    return torch.zeros_like(within).scatter(-1, order, within)


def by_count(response: Tensor, remove: float) -> Tensor:
    """The units with the greatest responses but a fraction: bool [B, U]."""
    n = max(1, round(response.shape[-1] * (1 - remove)))
    return torch.zeros_like(response, dtype=torch.bool).scatter(-1, response.topk(n, -1).indices, True)


class Firing(nn.Module):
    """Predictors of all places, the hooks by which they see a model, and what they are trained for.

    Args:
        knobs: of the method.
        task: places and budget.
        decoder: whether the model writes text, and predictors see the first tokens alone.
    """

    hidden_states = False
    teacher = None
    of_tokens = False

    def __init__(self, knobs: FireTogether, task: Task, decoder: bool) -> None:
        super().__init__()
        self.knobs, self.task, self.places = knobs, task, task.places
        self.tokens = knobs.tokens if decoder else 0
        with torch.random.fork_rng():
            torch.manual_seed(task.asked.seed)
            made = [Predictor(task.view.hidden, len(place.units), knobs.rank) for place in self.places]
        self.predictors = nn.ModuleList(made)
        # Found on the first batch: how much of the responses stays so that the budget is met.
        self.register_buffer("mass", torch.tensor(-1.0))
        self._pooled: dict[int, Tensor] = {}
        self._response: dict[int, Tensor] = {}
        self._mask: Tensor | None = None

    def attach(self, model: Any, view: ModelView) -> None:
        """Hooks into a model's forward, and itself among its parts, so that checkpoints hold the predictors."""
        blocks = blocks_of(model)
        for number, place in enumerate(self.places):
            _, block, kind = place.address.split(".")
            inside = blocks[int(block)]
            require_dynamic(inside, kind, place.address, self.tokens > 0)
            core, _ = projections(inside, kind)
            sublayer = view.sublayer(place.address)
            units = channel_units(view.output(sublayer), place.axis, view.sizes(sublayer))
            inside.get_submodule(core).register_forward_pre_hook(partial(self._reads, number), with_kwargs=True)
            output_projection(inside, kind).register_forward_pre_hook(partial(self._answers, number, units))
        model.register_forward_pre_hook(self._begins, with_kwargs=True)
        model.add_module("prunekit_gates", self)

    def _begins(self, _: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._mask = kwargs.get("attention_mask")

    def _reads(self, number: int, _: Any, args: tuple[Tensor, ...], kwargs: Mapping[str, Any]) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        given = given.detach()[:, : self.tokens or None].float()
        if self._mask is None:
            self._pooled[number] = given.mean(1)
        else:
            mask = self._mask[:, : given.shape[1], None].to(given)
            self._pooled[number] = (given * mask).sum(1) / mask.sum(1)

    def _answers(self, number: int, units: Tensor, _: Any, args: tuple[Tensor, ...]) -> None:
        """The response of each unit over the tokens, [B, U]."""
        given = args[0].detach()[:, self.tokens :].float()
        if self._mask is not None:
            given = given * self._mask[:, self.tokens :, None].to(given)
        n = int(units.max()) + 1
        squares = given.new_zeros((*given.shape[:2], n)).index_add(2, units.to(given.device), given.square())
        if self.knobs.response == "max":
            squares = squares.amax(1)
        else:
            squares = squares.sum(1) / (given.shape[1] if self._mask is None else self._mask.sum(1, keepdim=True))
        self._response[number] = squares.sqrt()

    def targets(self) -> list[Tensor]:
        """Which units of each place should be computed for the sequences of the last pass, bool [B, U]."""
        responses = [self._response[number] for number in range(len(self.places))]
        if float(self.mass) < 0:
            self.mass.fill_(self._fitting(responses))
            self._begin_with(self.targets())
        pick, at = (by_mass, float(self.mass)) if self.knobs.targets == "mass" else (by_count, 1 - float(self.mass))
        return [pick(response, at) for response in responses]

    def _fitting(self, responses: Sequence[Tensor]) -> float:
        """How much stays at which the targets remove what the budget asks for."""
        low, high = 0.0, 1.0
        for _ in range(20):
            self.mass.fill_((low + high) / 2)
            kept = torch.cat([target.float().mean(0) for target in self.targets()])
            gone = self.task.costs.before - float(self.task.costs.left(kept.cpu().double()))
            low, high = (float(self.mass), high) if gone > self.task.goal else (low, float(self.mass))
        return low

    def _begin_with(self, targets: Sequence[Tensor]) -> None:
        """Before they have learned anything predictors say how often each unit fired, with one guess added."""
        for predictor, target in zip(self.predictors, targets, strict=True):
            counted = target.double()
            often = (counted.sum(0) + counted.mean()) / (len(target) + 1)
            with torch.no_grad():
                predictor.up.bias.copy_(torch.logit(often, eps=1e-3))

    def forward(self, outputs: Any, inputs: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        """Mean over sub-layers and units of the binary cross entropy between what is foretold and what fires.

        The model's last pass tells both; see `Objective` for the arguments.
        """
        terms = []
        for number, (predictor, target) in enumerate(zip(self.predictors, self.targets(), strict=True)):
            logits = predictor(self._pooled[number])
            terms.append(nn.functional.binary_cross_entropy_with_logits(logits, target.float()))
        return torch.stack(terms).mean()

    def told(self, model: Any, data: Data, batch: int) -> dict[str, Any]:
        """Cost not computed, by what is foretold and by the targets, and the share of units foretold right.

        Args:
            model: that it is attached to.
            data: the held-out rows are read, or those trained on where there are none.
            batch: rows at once.
        """
        counts = torch.zeros(len(self.places), 4, dtype=torch.float64)
        for rows in (data.held_out if len(data.held_out) else data.train).split(batch):
            with torch.no_grad():
                model(**{name: values[rows].to(model.device) for name, values in data.inputs.items()})
                for number, (predictor, target) in enumerate(zip(self.predictors, self.targets(), strict=True)):
                    fires = predictor(self._pooled[number]) > 0
                    found = [fires.numel(), fires.sum(), target.sum(), (fires == target).sum()]
                    counts[number] += torch.tensor([float(value) for value in found], dtype=torch.float64)
        n, fired, wanted, right = counts.T
        left = [float(self.task.costs.left(self._spread(share))) for share in (fired / n, wanted / n)]
        gone = [(self.task.costs.before - value) / self.task.whole for value in left]
        return {
            "removed": gone[0],
            "removed_by_targets": gone[1],
            "foretold": float(right.sum() / n.sum()),
            "mass": float(self.mass),
        }

    def _spread(self, shares: Tensor) -> Tensor:
        sizes = torch.tensor([len(place.units) for place in self.places])
        return shares.repeat_interleave(sizes)

    def tensors(self) -> dict[str, Tensor]:
        """The predictors' tensors behind the address of their sub-layer."""
        return {
            f"{place.address}.{name}": value.detach().cpu()
            for place, predictor in zip(self.places, self.predictors, strict=True)
            for name, value in predictor.state_dict().items()
        }


def places_once(places: Sequence[Place]) -> bool:
    """Whether no sub-layer has two places."""
    return len({place.address for place in places}) == len(places)
