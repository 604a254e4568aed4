"""Where gates sit: what each multiplies, and the hooks that make it do so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunekit.core.errors import StructureError
from prunekit.modeling.modeling_prunekit import blocks_of, output_projection
from prunekit.structure.parts import HIDDEN

if TYPE_CHECKING:
    from prunekit.structure.parts import TensorRef
    from prunekit.structure.view import ModelView

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
        address: of the sub-layer; `hidden` for hidden channels, of which there is one group in a model.
        units: addresses of the units.
        begin: number of the first unit among the units of all places.
        axis: for widths the axis that a unit is one position of, else "".
        multiple: what the number of units that stay must be a multiple of, whatever the budget says.
    """

    kind: str
    address: str
    units: tuple[str, ...]
    begin: int
    axis: str = ""
    multiple: int = 1

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
                owner = group.address if kind == HIDDEN else group.address.rpartition(".")[0]
                parts = [(kind, owner, group.units, group.axis)]
            for name, address, units, axis in parts:
                if axis and (len(units) == 1 or (group.output is None and kind != HIDDEN)):
                    continue
                found.append(Place(name, address, units, begin, axis, _multiple(view, kind)))
                begin += len(units)
    if not found:
        raise StructureError(f"`{view.model_type}` has nothing to learn of {', '.join(kinds)}")
    if (
        any(place.kind in ("sublayers", HIDDEN) for place in found)
        and view.norm == "pre"
        and view.arch.name not in _ADD
    ):
        why = "a norm or a scale may stand between the last matrix of a sub-layer and the residual stream"
        raise StructureError(f"whole sub-layers and hidden channels of `{view.model_type}` cannot be gated", why=why)
    return tuple(found)


def _multiple(view: ModelView, kind: str) -> int:
    """Hidden widths that a configuration can say are multiples of the number of heads."""
    if kind != HIDDEN or "head_width" not in view.arch.keys:
        return 1
    return view.widths["attention"]["kv"] * view.widths["attention"]["rep"]


def channel_units(ref: TensorRef, axis: str, sizes: dict[str, int]) -> Tensor:
    """For each input channel of an output projection the position of its unit, int64 [width].

    Heads 2 x 2 of width 1, by `kv`: 0 0 1 1; by `rep`: 0 1 0 1.
    """
    side = next(dim for dim in ref.layout if dim != ("hidden",))
    shape = [sizes[name] for name in side]
    positions = torch.arange(sizes[axis]).view([-1 if name == axis else 1 for name in side])
    return positions.expand(shape).flatten()


def attach(model: Any, view: ModelView, place: Place, factors: Factors, kept: Callable[[], Tensor]) -> None:
    """Puts a place's gate into a model's forward by hooks; they stay.

    Args:
        model: stock or heterogeneous, of the view's structure.
        view: the structure.
        place: one of `places_of`.
        factors: asked in every forward.
        kept: the same; how much of each unit counts in a layer norm, 0 to 1 [units], no gradient.
    Raises:
        StructureError: for a post-norm sub-layer whose residual sum cannot be reached.
    """
    if place.kind == HIDDEN:
        _attach_hidden(model, view, factors, kept)
        return
    _, number, kind = place.address.split(".")
    block = blocks_of(model)[int(number)]
    layer = output_projection(block, kind)
    if place.axis:
        attach_width(model, view, place, factors)
    elif view.norm == "post":
        _attach_post_norm(block, layer, factors, place.address)
    else:
        layer.register_forward_hook(lambda _, given, found: found * factors(found))


def attach_width(model: Any, view: ModelView, place: Place, factors: Factors) -> None:
    """As `attach` for units of a width: what enters the output projection is multiplied, a unit's channels alike."""
    _, number, kind = place.address.split(".")
    layer = output_projection(blocks_of(model)[int(number)], kind)
    sublayer = view.sublayer(place.address)
    units = channel_units(view.output(sublayer), place.axis, view.sizes(sublayer))
    alone = bool((units == torch.arange(len(units))).all())

    def gated(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        factor = factors(given[0])
        return (given[0] * (factor if alone else factor[..., units.to(factor.device)]), *given[1:])

    layer.register_forward_pre_hook(gated)


def _attach_post_norm(block: torch.nn.Module, layer: torch.nn.Module, factors: Factors, address: str) -> None:
    """Moves what leaves the norm towards what entered the sum: a factor of 0 leaves the identity, as the cut does."""
    parent = _summing(block, layer, address)

    def gated(_: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], found: Tensor) -> Tensor:
        entered = kwargs["input_tensor"] if "input_tensor" in kwargs else args[1]
        return entered + factors(found) * (found - entered)

    parent.register_forward_hook(gated, with_kwargs=True)


def _summing(block: torch.nn.Module, layer: torch.nn.Module, address: str) -> torch.nn.Module:
    """The module of a post-norm sub-layer that holds its last matrix, residual sum and norm.

    Raises:
        StructureError: where there is none.
    """
    name = next(name for name, module in block.named_modules() if module is layer)
    parent = block.get_submodule(name.rpartition(".")[0])
    if list(inspect.signature(parent.forward).parameters)[:2] != ["hidden_states", "input_tensor"]:
        why = "its residual sum is not in the module of its last matrix"
        raise StructureError(f"`{address}` cannot be gated", why=why, hint="take its kind out of `remove`")
    return parent


def _attach_hidden(model: Any, view: ModelView, factors: Factors, kept: Callable[[], Tensor]) -> None:
    """Multiplies what begins the residual stream and what is added to it; in post-norm models what norms leave of it.

    Layer norms count a channel as much as it is kept, so that a channel that goes is in no mean and no variance.
    """
    blocks = blocks_of(model)

    def begun(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] * factors(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] * factors(kwargs["hidden_states"])}

    blocks[0].register_forward_pre_hook(begun, with_kwargs=True)
    for sublayer in view.sublayers:
        block = blocks[sublayer.block]
        layer = output_projection(block, sublayer.kind)
        place = _summing(block, layer, sublayer.address) if view.norm == "post" else layer
        place.register_forward_hook(lambda _, given, found: found * factors(found))
    if view.hidden_rule().norm == "layer":
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm) and module.normalized_shape == (view.hidden,):
                module.__dict__["forward"] = partial(_narrow_norm, module, kept)


def _narrow_norm(norm: Any, kept: Callable[[], Tensor], given: Tensor) -> Tensor:
    """A layer norm in which channels count in part; what does not count leaves as 0."""
    share = kept().to(given)
    total = share.sum()
    mean = (given * share).sum(-1, keepdim=True) / total
    variance = ((given - mean).square() * share).sum(-1, keepdim=True) / total
    normal = (given - mean) * (variance + norm.eps).rsqrt()
    return (normal * norm.weight + norm.bias) * share
