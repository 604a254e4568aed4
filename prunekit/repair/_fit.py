"""The pass behind least squares: two residual streams side by side, one regression a sub-layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunekit.calibrate.stack import Stack, State
from prunekit.core.errors import PlanError
from prunekit.core.progress import NULL_PROGRESS, Progress

# Tokens that run at once; more are no faster on a CPU.
_TOKENS = 2048
# Two orders of the same sum, relative to its largest term; bfloat16 has 8 bits.
_ADDITIVE = 0.05


@dataclass(frozen=True)
class Projection:
    """An output projection.

    Args:
        weight: float32 [hidden, channels that stay], on the CPU.
        bias: float32 [hidden]; None where the layer has none.
    """

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Repaired:
    """What a repair found.

    Args:
        projections: new output projections by the address of their sub-layer.
        error: mean square difference of the two residual streams after the last sub-layer, over the mean square of the
            dense one.
    """

    projections: Mapping[str, Projection]
    error: float


@dataclass
class _Streams:
    """Residual streams of the dense and of the repaired model, a part of the data each."""

    states: list[State]
    dense: list[Tensor]
    cut: list[Tensor] = field(default_factory=list)


def fit(
    stack: Stack,
    inputs: Mapping[str, Tensor],
    drop: frozenset[str],
    kept: Mapping[str, Tensor],
    ridge: float,
    progress: Progress = NULL_PROGRESS,
) -> Repaired:
    """Fits output projections in execution order; arguments as for `LeastSquares.fit`."""
    with torch.no_grad():
        states = [stack.enter(part) for part in _parts(inputs)]
        streams = _Streams(states, [state.hidden for state in states])
        streams.cut = list(streams.dense)
        found: dict[str, Projection] = {}
        addresses, same, i = stack.addresses, True, 0
        with progress.task("repairing", total=len(addresses), unit="sub-layers") as task:
            while i < len(addresses):
                end = i + 1
                while end < len(addresses) and addresses[end] in drop:
                    end += 1
                for j in range(i, end):
                    streams.dense = [stack.run(j, hidden, s) for hidden, s in zip(streams.dense, states, strict=True)]
                same = same and end == i + 1 and addresses[i] not in drop and addresses[i] not in kept
                if same:
                    streams.cut = list(streams.dense)
                elif addresses[i] not in drop:
                    found[addresses[i]] = _repair(stack, i, streams, kept.get(addresses[i]), ridge)
                task.advance(end - i)
                i = end
        return Repaired(found, _error(streams))


def _parts(inputs: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    first = next(iter(inputs.values()))
    tokens = first.shape[1] if first.dim() == 2 else first.shape[-1]
    size = max(1, _TOKENS // tokens)
    return [
        {name: value[begin : begin + size] for name, value in inputs.items()}
        for begin in range(0, first.shape[0], size)
    ]


def _repair(stack: Stack, i: int, streams: _Streams, kept: Tensor | None, ridge: float) -> Projection:
    """Fits one projection and moves the cut model's stream behind it."""
    entering = _entering(stack, i, streams, kept)
    weight, bias = stack.projection(i)
    weight = weight if kept is None else weight[:, kept.to(weight.device)]
    pairs = [
        (_rows(x, state), _rows(target - hidden, state))
        for x, hidden, target, state in zip(entering, streams.cut, streams.dense, streams.states, strict=True)
    ]
    fitted = _regression(pairs, weight, bias is not None, ridge)
    new = Projection(fitted[0], fitted[1])
    matrix = new.weight.to(weight)
    added = [x @ matrix.T if new.bias is None else x @ matrix.T + new.bias.to(weight) for x in entering]
    streams.cut = [hidden + part for hidden, part in zip(streams.cut, added, strict=True)]
    return new


def _entering(stack: Stack, i: int, streams: _Streams, kept: Tensor | None) -> list[Tensor]:
    """What enters the projection in the cut model, the channels that stay [sequences, tokens, channels]."""
    found: list[Tensor] = []
    left: list[Tensor] = []

    def seen(address: str, entering: Tensor, leaving: Tensor) -> None:
        found.append(entering if kept is None else entering[..., kept.to(entering.device)])
        left.append(leaving)

    with stack.projections(seen):
        for hidden, state in zip(streams.cut, streams.states, strict=True):
            after = stack.run(i, hidden, state)
            _require_additive(stack.addresses[i], after - hidden, left.pop())
    return found


def _require_additive(address: str, added: Tensor, leaving: Tensor) -> None:
    scale = float(added.abs().max())
    if float((added - leaving).abs().max()) > _ADDITIVE * scale:
        raise PlanError(
            f"`{address}` cannot be repaired by least squares",
            why="what it adds to the residual stream is not the output of its last matrix: a norm or a scale follows",
            hint="leave `repair` out",
        )


def _rows(values: Tensor, state: State) -> Tensor:
    return values.flatten(0, -2) if state.mask is None else values[state.mask]


def _regression(
    pairs: Sequence[tuple[Tensor, Tensor]], weight: Tensor, with_bias: bool, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """Weights and bias that map inputs to what is to be added, held to the dense weights.

    Args:
        pairs: inputs [rows, channels] and what is to be added [rows, hidden].
        weight: of the dense model [hidden, channels].
    """
    channels, wide = weight.shape[1], {"dtype": torch.float64, "device": weight.device}
    gram, cross = torch.zeros(channels, channels, **wide), torch.zeros(channels, weight.shape[0], **wide)
    count = sum(x.shape[0] for x, _ in pairs)
    mean_x = sum(x.sum(0, dtype=torch.float64) for x, _ in pairs) / count
    mean_y = sum(y.sum(0, dtype=torch.float64) for _, y in pairs) / count
    for x, y in pairs:
        x, y = x.float(), y.float()
        if with_bias:
            x, y = x - mean_x.float(), y - mean_y.float()
        gram += (x.T @ x).double()
        cross += (x.T @ y).double()
    hold = ridge * float(gram.diagonal().mean())
    gram.diagonal().add_(hold)
    found = torch.linalg.solve(gram, cross + hold * weight.T.double()).T
    bias = mean_y - found @ mean_x if with_bias else None
    return found.float().cpu(), None if bias is None else bias.float().cpu()


def _error(streams: _Streams) -> float:
    pairs = [
        (_rows(cut, state), _rows(dense, state))
        for cut, dense, state in zip(streams.cut, streams.dense, streams.states, strict=True)
    ]
    difference = sum(float((cut.float() - dense.float()).square().sum()) for cut, dense in pairs)
    return difference / sum(float(dense.float().square().sum()) for _, dense in pairs)
