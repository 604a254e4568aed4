"""The pass behind regressions: two residual streams side by side, one regression a sub-layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


# Inputs [rows, channels] and what is to be added [rows, hidden], a part of the data each.
Pairs = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Solver:
    """How output projections are fitted.

    Args:
        name: registry name of the method.
        solve: new projection from the pairs and the dense weight [hidden, channels that stay] and bias.
        everywhere: every projection from the first cut on, not only those right before what was removed.
    """

    name: str
    solve: Callable[[Pairs, Tensor, Tensor | None], Projection]
    everywhere: bool = True


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
    solver: Solver,
    progress: Progress = NULL_PROGRESS,
) -> Repaired:
    """Fits output projections in execution order; other arguments as for `LeastSquares.fit`."""
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
                    fitted = solver if solver.everywhere or end > i + 1 else None
                    new = _repaired(stack, i, streams, kept.get(addresses[i]), fitted)
                    if new is not None:
                        found[addresses[i]] = new
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


def _repaired(stack: Stack, i: int, streams: _Streams, kept: Tensor | None, solver: Solver | None) -> Projection | None:
    """Fits one projection, or leaves it as it is, and moves the cut model's stream behind it."""
    if solver is None and kept is None:
        streams.cut = [stack.run(i, hidden, state) for hidden, state in zip(streams.cut, streams.states, strict=True)]
        return None
    entering = _entering(stack, i, streams, kept, solver)
    weight, bias = stack.projection(i)
    weight = weight if kept is None else weight[:, kept.to(weight.device)]
    new = None
    if solver is not None:
        pairs = [
            (_rows(x, state), _rows(target - hidden, state))
            for x, hidden, target, state in zip(entering, streams.cut, streams.dense, streams.states, strict=True)
        ]
        new = solver.solve(pairs, weight, bias)
        weight, bias = new.weight.to(weight), None if new.bias is None else new.bias.to(weight)
    added = [x @ weight.T if bias is None else x @ weight.T + bias for x in entering]
    streams.cut = [hidden + part for hidden, part in zip(streams.cut, added, strict=True)]
    return new


def _entering(stack: Stack, i: int, streams: _Streams, kept: Tensor | None, solver: Solver | None) -> list[Tensor]:
    """What enters the projection in the cut model, the channels that stay [sequences, tokens, channels]."""
    found: list[Tensor] = []
    left: list[Tensor] = []

    def seen(address: str, entering: Tensor, leaving: Tensor) -> None:
        found.append(entering if kept is None else entering[..., kept.to(entering.device)])
        left.append(leaving)

    with stack.projections(seen):
        for hidden, state in zip(streams.cut, streams.states, strict=True):
            after = stack.run(i, hidden, state)
            if solver is not None:
                _require_additive(solver, stack.addresses[i], after - hidden, left.pop())
    return found


def _require_additive(solver: Solver, address: str, added: Tensor, leaving: Tensor) -> None:
    scale = float(added.abs().max())
    if float((added - leaving).abs().max()) > _ADDITIVE * scale:
        raise PlanError(
            f"`{address}` cannot be repaired by {solver.name}",
            why="what it adds to the residual stream is not the output of its last matrix: a norm or a scale follows",
            hint="leave `repair` out",
        )


def _rows(values: Tensor, state: State) -> Tensor:
    return values.flatten(0, -2) if state.mask is None else values[state.mask]


def _error(streams: _Streams) -> float:
    pairs = [
        (_rows(cut, state), _rows(dense, state))
        for cut, dense, state in zip(streams.cut, streams.dense, streams.states, strict=True)
    ]
    difference = sum(float((cut.float() - dense.float()).square().sum()) for cut, dense in pairs)
    return difference / sum(float(dense.float().square().sum()) for _, dense in pairs)


def held_regression(pairs: Pairs, weight: Tensor, with_bias: bool, ridge: float) -> Projection:
    """Weights and bias that map inputs to what is to be added, held to the dense weights.

    Args:
        pairs: inputs [rows, channels] and what is to be added [rows, hidden].
        weight: what weights are held to [hidden, channels].
        with_bias: whether there is a bias; it is not held to anything.
        ridge: how strongly weights are held, in mean squares of the inputs.
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
    return Projection(found.float().cpu(), None if bias is None else bias.float().cpu())


def error_of(
    stack: Stack,
    inputs: Mapping[str, Tensor],
    drop: frozenset[str],
    kept: Mapping[str, Tensor],
    projections: Mapping[str, Projection],
) -> float:
    """`Repaired.error` of projections that were found without the two streams; norms may follow the sums."""
    streams = _Streams([], [])
    with torch.no_grad():
        for part in _parts(inputs):
            state = stack.enter(part)
            dense = cut = state.hidden
            for i, address in enumerate(stack.addresses):
                dense = stack.run(i, dense, state)
                if address in drop:
                    continue
                channels, new = kept.get(address), projections.get(address)
                if new is None or channels is None:
                    cut = stack.run(i, cut, state)
                    continue
                with stack.projecting(i, channels, new.weight, new.bias):
                    cut = stack.run(i, cut, state)
            streams.states.append(state)
            streams.dense.append(dense)
            streams.cut.append(cut)
    return _error(streams)
