"""Where gates sit: what each multiplies, and the hooks that make it do so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.core.errors import StructureError
from prunekit.modeling.modeling_prunekit import blocks_of, output_projection

if TYPE_CHECKING:
    from prunekit.structure.view import ModelView, TensorRef

WHOLE = ("sublayers", "attention", "ffn")
# Pre-norm architectures whose sub-layers add the output of their last matrix, no norm or scale between.
_ADD = ("llama", "phi3", "gpt2")
# Factors for what a place multiplies [..., width], [..., units].
Factors = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """A group of units with a gate each.

    Args:
        kind: of unit; `sublayers` for a whole sub-layer, which is one unit.
        address: of the sub-layer.
        units: addresses of the units.
        begin: number of the first unit among the units of all places.
        axis: for widths the axis that a unit is one position of, else "".
    """

    kind: str
    address: str
    units: tuple[str, ...]
    begin: int
    axis: str = ""

    @property
    def slice(self) -> slice:
        """Its units among those of all places."""
        return slice(self.begin, self.begin + len(self.units))


def places_of(view: ModelView, kinds: Sequence[str]) -> tuple[Place, ...]:
    """Places of some kinds, in the order of the kinds and then of depth; a group of one unit has nothing to choose.

    Raises:
        StructureError: where a kind cannot be cut, or no gate can be put.
    """
    found: list[Place] = []
    begin = 0
    for kind in kinds:
        for group in view.groups(kind):
            parts: list[tuple[str, str, tuple[str, ...], str]]
            if kind in WHOLE:
                parts = [("sublayers", unit, (unit,), "") for unit in group.units]
            else:
                parts = [(kind, group.address.rpartition(".")[0], group.units, group.axis)]
            for name, address, units, axis in parts:
                if axis and (len(units) == 1 or group.output is None):
                    continue
                found.append(Place(name, address, units, begin, axis))
                begin += len(units)
    if not found:
        raise StructureError(f"`{view.model_type}` has nothing to learn of {', '.join(kinds)}")
    if any(place.kind == "sublayers" for place in found) and view.norm == "pre" and view.arch.name not in _ADD:
        why = "a norm or a scale may stand between the last matrix of a sub-layer and the residual stream"
        raise StructureError(f"whole sub-layers of `{view.model_type}` cannot be gated", why=why)
    return tuple(found)


def channel_units(ref: TensorRef, axis: str, sizes: dict[str, int]) -> Tensor:
    """For each input channel of an output projection the position of its unit, int64 [width].

    Heads 2 x 2 of width 1, by `kv`: 0 0 1 1; by `rep`: 0 1 0 1.
    """
    side = next(dim for dim in ref.layout if dim != ("hidden",))
    shape = [sizes[name] for name in side]
    positions = torch.arange(sizes[axis]).view([-1 if name == axis else 1 for name in side])
    return positions.expand(shape).flatten()


def attach(model: Any, view: ModelView, place: Place, factors: Factors) -> None:
    """Puts a place's gate into a model's forward by hooks; they stay.

    Args:
        model: stock or heterogeneous, of the view's structure.
        view: the structure.
        place: one of `places_of`.
        factors: asked in every forward.
    Raises:
        StructureError: for a post-norm sub-layer whose residual sum cannot be reached.
    """
    _, number, kind = place.address.split(".")
    block = blocks_of(model)[int(number)]
    layer = output_projection(block, kind)
    if place.axis:
        sublayer = view.sublayer(place.address)
        units = channel_units(view.output(sublayer), place.axis, view.sizes(sublayer))
        _attach_width(layer, factors, units)
    elif view.norm == "post":
        _attach_post_norm(block, layer, factors, place.address)
    else:
        layer.register_forward_hook(lambda _, given, found: found * factors(found))


def _attach_width(layer: torch.nn.Module, factors: Factors, units: Tensor) -> None:
    """Multiplies what enters an output projection; channels of a unit share its factor."""
    alone = bool((units == torch.arange(len(units))).all())

    def gated(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factor = factors(given[0])
        return (given[0] * (factor if alone else factor[..., units.to(factor.device)]), *given[1:])

    layer.register_forward_pre_hook(gated)


def _attach_post_norm(block: torch.nn.Module, layer: torch.nn.Module, factors: Factors, address: str) -> None:
    """Moves what leaves the norm towards what entered the sum: a factor of 0 leaves the identity, as the cut does."""
    name = next(name for name, module in block.named_modules() if module is layer)
    parent = block.get_submodule(name.rpartition(".")[0])
    if list(inspect.signature(parent.forward).parameters)[:2] != ["hidden_states", "input_tensor"]:
        why = "its residual sum is not in the module of its last matrix"
        raise StructureError(f"`{address}` cannot be gated as a whole", why=why, hint="take its kind out of `remove`")

    def gated(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], found: Tensor) -> Tensor:
        entered = kwargs["input_tensor"] if "input_tensor" in kwargs else args[1]
        return entered + factors(found) * (found - entered)

    parent.register_forward_hook(gated, with_kwargs=True)
