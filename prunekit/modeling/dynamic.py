"""Units that are chosen anew for each input: a predictor a sub-layer says which, and only those are computed.

The weights stay those of the dense model, whole; the predictors lie beside them in the folder `predictors`, and the
section `prunekit.dynamic` of the configuration names them. Whoever loads the folder without this module gets the dense
model.

B: sequences, T: tokens, D: width of the residual stream, U: units of a sub-layer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from prunekit.core.errors import CheckpointError, StructureError
from prunekit.modeling.modeling_prunekit import blocks_of, projections

FILE = Path("predictors") / "predictors.safetensors"
SECTION = "dynamic"
_SIZES = {"out": ("out_features", "nf"), "in": ("in_features", "nx")}


class Predictor(nn.Module):
    """From what a sub-layer reads, a mean over tokens, to a logit for each unit: above 0 it is computed.

    Args:
        width: of the residual stream.
        units: of the sub-layer.
        rank: of the matrix between them.
    """

    def __init__(self, width: int, units: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, units)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits [B, U] for means [B, D], in float32."""
        found: Tensor = self.up(self.down(layer_norm(pooled.float(), pooled.shape[-1:])))
        return found


def require_dynamic(block: nn.Module, kind: str, address: str, decoder: bool) -> None:
    """Fails where a sub-layer's units cannot be chosen for each input.

    Args:
        block: that holds it.
        kind: `attention` or `ffn`.
        address: for messages.
        decoder: whether the model writes text.
    Raises:
        StructureError: with the reason.
    """
    why = ""
    if decoder and kind == "attention":
        why = "the KV cache of a model that writes text holds the keys of all heads"
    else:
        core, layers = projections(block, kind)
        units = {unit for _, unit in layers.values()}
        if decoder and not all(path.startswith(f"{core}.") for path in layers):
            why = "its layers are not in one module"
        elif units - {"ffn", "heads", "kv"} or any(not hasattr(_at(block, path), "weight") for path in layers):
            why = "its layers are not one for each of its parts"
        elif kind == "attention" and len({tuple(_at(block, path).weight.shape) for path in layers}) > 1:
            why = "query, key and value are not matrices of one shape"
    if why:
        hint = "take its kind out of `learn.remove`"
        raise StructureError(f"units of `{address}` cannot be chosen for each input", why=why, hint=hint)


def _at(block: nn.Module, path: str) -> Any:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


class _Chosen:
    """One sub-layer whose units are chosen: for the tokens after the first ones, or for a whole sequence.

    Of one sequence the chosen units' weights are gathered once and used for the rest of it. Of several each has units
    of its own, so all are computed and the others count nothing.

    Args:
        block: that holds it.
        kind: `attention` or `ffn`.
        predictor: says which.
        tokens: at the start of a sequence that are read with all units; 0 reads the whole sequence before choosing.
    """

    def __init__(self, block: nn.Module, kind: str, predictor: Predictor, tokens: int) -> None:
        self.block, self.predictor, self.tokens = block, predictor, tokens
        self.units = predictor.up.out_features
        core, self.layers = projections(block, kind)
        self.core: Any = block.get_submodule(core)
        self.whole = self.core.forward
        self.own = {path: block.get_submodule(path) for path in self.layers}
        self.core.forward = self._forward
        self.begin()

    def begin(self) -> None:
        """Forgets what was chosen for the sequence before."""
        self.put(self.own)
        self.narrow: dict[str, nn.Module] | None = None
        self.read, self.sum = 0, None

    def put(self, layers: Mapping[str, nn.Module]) -> None:
        """Puts layers into the block."""
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(self.block.get_submodule(parent), name, layer)

    def detach(self) -> None:
        """Makes the block what it was."""
        self.begin()
        del self.core.forward

    def _forward(self, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.tokens:
            self.begin()
            self.narrow = self._narrowed(given.mean(1))
            self.put(self.narrow)
            # What lies outside the module runs later; the next sequence puts all back.
            return self.whole(given, *args, **kwargs)
        parts, n = [], min(given.shape[1], self.tokens - self.read)
        if n:
            # Some layers view what they get.
            parts.append(self.whole(given[:, :n].contiguous()))
            total = given[:, :n].float().sum(1)
            self.sum = total if self.sum is None else self.sum + total
            self.read += n
        if n < given.shape[1]:
            if self.narrow is None and self.sum is not None:
                self.narrow = self._narrowed(self.sum / self.read)
            self.put(self.narrow or {})
            parts.append(self.whole(given[:, n:].contiguous()))
            self.put(self.own)
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _narrowed(self, pooled: Tensor) -> dict[str, nn.Module]:
        """Layers of the chosen units."""
        with torch.no_grad():
            fires = self.predictor(pooled) > 0
        # A matrix without a column is none; where no unit is expected to fire the likeliest is taken.
        fires |= torch.nn.functional.one_hot(self.predictor(pooled).argmax(-1), self.units).bool()
        last = next(path for path, (side, _) in self.layers.items() if side == "in")
        if len(fires) > 1:
            return {last: _Weighed(self.own[last], self._channels(fires, last))}
        return {path: self._gathered(path, side, fires) for path, (side, _) in self.layers.items()}

    def _channels(self, fires: Tensor, path: str) -> Tensor:
        """Which channels of a layer's side belong to units that fire: bool [B, channels]."""
        side, unit = self.layers[path]
        layer: Any = self.own[path]
        n = layer.weight.shape[_dim(layer, side)] // self.units
        # Neurons come part by part (gate, up), heads channel by channel.
        return fires.repeat(1, n) if unit == "ffn" else fires.repeat_interleave(n, 1)

    def _gathered(self, path: str, side: str, fires: Tensor) -> nn.Module:
        layer: Any = self.own[path]
        index, dim = self._channels(fires, path)[0].nonzero().flatten(), _dim(layer, side)
        found = copy.copy(layer)
        parameters = {"weight": nn.Parameter(layer.weight.detach().index_select(dim, index), requires_grad=False)}
        if layer.bias is not None:
            bias = layer.bias.detach()
            kept = bias.index_select(0, index) if side == "out" else bias
            parameters["bias"] = nn.Parameter(kept, requires_grad=False)
        found._parameters = {"bias": None, **parameters}
        setattr(found, next(name for name in _SIZES[side] if hasattr(layer, name)), len(index))
        return found


class _Weighed(nn.Module):
    """An output projection that reads some channels of each sequence."""

    def __init__(self, layer: nn.Module, channels: Tensor) -> None:
        super().__init__()
        self.layer, self.channels = layer, channels

    def forward(self, given: Tensor) -> Tensor:
        found: Tensor = self.layer(given * self.channels[:, None].to(given))
        return found


def _dim(layer: Any, side: str) -> int:
    """Dimension of a weight: Linear stores [out, in], Conv1D [in, out]."""
    return int((side == "in") != hasattr(layer, "nf"))


@contextmanager
def choosing(model: Any, predictors: Mapping[str, Predictor], tokens: int) -> Iterator[Any]:
    """Meanwhile a model computes, for each input, the units that its predictors choose.

    Padding counts as text: give sequences of one length. A sequence begins where the model is called without a filled
    KV cache.

    Args:
        model: dense, in eval mode.
        predictors: by address of the sub-layer, such as `blocks.3.ffn`.
        tokens: at the start of a sequence that are read with all units; 0 reads the whole sequence before choosing.
    """
    blocks, parts = blocks_of(model), []
    for address, predictor in predictors.items():
        _, number, kind = address.split(".")
        require_dynamic(blocks[int(number)], kind, address, tokens > 0)
        parts.append(_Chosen(blocks[int(number)], kind, predictor.to(model.device), tokens))

    def begin(_: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        cache = next((kwargs[name] for name in ("cache", "past_key_values") if kwargs.get(name) is not None), None)
        if cache is None or int(cache.get_seq_length()) == 0:
            for part in parts:
                part.begin()

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        yield model
    finally:
        hook.remove()
        for part in parts:
            part.detach()


def write_predictors(folder: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Puts predictors into a checkpoint folder and names them in its configuration.

    Args:
        folder: a checkpoint.
        tensors: of all predictors, as `state_dict` names them behind the address.
        about: plain values; `tokens` and `rank` are needed to load them.
    """
    from safetensors.torch import save_file

    from prunekit.core.files import write_json

    (folder / FILE).parent.mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / FILE)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    section = {**about, "file": FILE.as_posix(), "sub_layers": sorted({_address(name) for name in tensors})}
    config["prunekit"] = {**config.get("prunekit", {}), SECTION: section}
    write_json(folder / "config.json", config)


def load_predictors(folder: Path) -> tuple[dict[str, Predictor], int] | None:
    """The predictors of a checkpoint folder by address and the tokens they wait for; None where it has none.

    Raises:
        CheckpointError: if the file is missing, damaged, or not what the configuration says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text("utf-8"))
    section = (config.get("prunekit") or {}).get(SECTION)
    if section is None:
        return None
    try:
        tensors = load_file(folder / FILE)
        found = {}
        for address in section["sub_layers"]:
            own = {name.removeprefix(f"{address}."): v for name, v in tensors.items() if _address(name) == address}
            units, rank = own["up.weight"].shape
            found[address] = Predictor(own["down.weight"].shape[1], units, rank).requires_grad_(False)
            found[address].load_state_dict(own)
        return found, int(section["tokens"])
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the predictors of `{folder}` cannot be loaded", why=" ".join(str(error).split())[:300],
            hint="take `prunekit.dynamic` out of its config.json to use the dense model",
        ) from error  # fmt: skip


def _address(name: str) -> str:
    return ".".join(name.split(".")[:3])


@contextmanager
def dynamic(model: Any, folder: Path) -> Iterator[Any]:
    """Meanwhile a model of a folder chooses its units for each input; without predictors there it stays as it is.

    Example:
        with dynamic(load_model(folder), folder) as model:
            model.generate(**inputs)
    """
    found = load_predictors(folder)
    if found is None:
        yield model
        return
    with choosing(model, *found):
        yield model
