"""Runs cut models on calibration data and tells how far their outputs are from the dense model's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from prunekit.calibrate.stack import Stack
from prunekit.core.errors import EvaluationError, UsageError
from prunekit.core.ranks import ALONE, Ranks
from prunekit.search._distances import DISTANCES, Distance
from prunekit.search._part import Part

_MIB = 2**20
# A batch of a CPU is no faster above some hundred tokens, and its memory should not show.
_CPU_BATCH_TOKENS = 2048
_CPU_PIECE_BYTES = 64 * _MIB
_CPU_KEPT_BYTES = 2048 * _MIB
_CPU_REFERENCE_BYTES = 1024 * _MIB
# Below so many tokens a sub-layer of a small model takes a GPU as long as one token does. Logits are not for free
# though, so that only so many candidates go along with one that is wanted.
_GPU_IDLE_TOKENS = 8192
_GPU_TOGETHER = 8
# A part is so many times as large as those before it together. A GPU pays for each part, a CPU for its tokens alone.
_GPU_GROWTH = 7
# Least outputs of a part: fewer say too little about the others, and matrix products on fewer rows are slower a row.
_PART_POSITIONS = 128
_REPEATS = 5

# Sets of removed sub-layers that run together on a part of the data, by its number.
Work = tuple[int, tuple[frozenset[str], ...]]


class Evaluator:
    """Distances between the dense model and cut ones, on calibration data in parts.

    Parts are some sequences each, small ones first, so that a search can look at a candidate on little data before it
    looks on all. The distance on all data is the mean over parts by `weights`. Several ranks share the work: each has
    the model and the data, what to run is the same for any number of them, and all get the same distances.

    Attributes:
        telling: whether outputs are many enough for candidates to be skipped by what they added earlier; they are not
            with a few images and a classifier.

    Args:
        stack: the model as sub-layers.
        inputs: the model's inputs by name, sequences first in each.
        cost: (address, `params` | `flops` | `kv_bytes`) -> what removing the sub-layer saves.
        protected: addresses that stay.
        batch_tokens: tokens run at once at most; None chooses by device and free memory.
        latency_known: whether `cost` knows `latency_ms` too, by a cost table.
        ranks: processes that search together.
    """

    def __init__(
        self,
        stack: Stack,
        inputs: Mapping[str, Tensor],
        cost: Callable[[str, str], float],
        protected: frozenset[str] = frozenset(),
        batch_tokens: int | None = None,
        latency_known: bool = False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.stack = stack
        self.addresses = stack.addresses
        self.protected = protected
        self.removed: frozenset[str] = frozenset()
        self.base: tuple[float, ...] = ()
        self.weights: tuple[float, ...] = ()
        self.distance: Distance = DISTANCES["js"]
        self._ranks = ranks
        self._known: dict[Work, list[float]] = {}
        self._evaluations = 0.0
        self._advance: Callable[[float], None] = lambda amount: None
        self._cost = cost
        self._latency_known = latency_known
        self._latency: dict[str, float] = {}
        device = stack.model.device
        self._cuda = device.type == "cuda"
        free = _least_free(device, ranks) if self._cuda else 0
        self._reference_bytes = free // 4 if self._cuda else _CPU_REFERENCE_BYTES
        self._parts = self._split(dict(inputs), free, batch_tokens)
        tokens = [part.tokens for part in self._parts]
        self._tokens_share = [count / sum(tokens) for count in tokens]

    def _split(self, inputs: dict[str, Tensor], free: int, batch_tokens: int | None) -> list[Part]:
        sequences = next(iter(inputs.values())).shape[0]
        first = self.stack.enter({name: value[:1] for name, value in inputs.items()})
        tokens = first.hidden.shape[1]
        positions = 1 if self.stack.features(first.hidden, first).dim() == 2 else tokens
        self.telling = positions * sequences >= _PART_POSITIONS
        if batch_tokens is None:
            batch_tokens = _gpu_batch_tokens(self.stack.model, free) if self._cuda else _CPU_BATCH_TOKENS
        self._batch_tokens = max(batch_tokens, tokens)
        least = -(-_PART_POSITIONS // positions)
        piece = min(1024 * _MIB, max(_CPU_PIECE_BYTES, free // 16)) if self._cuda else _CPU_PIECE_BYTES
        kept = free // 4 if self._cuda else _CPU_KEPT_BYTES
        parts, begin = [], 0
        growth = _GPU_GROWTH if self._cuda else 1
        for size in _sizes(sequences, least, growth, self._batch_tokens // tokens):
            some = {name: value[begin : begin + size] for name, value in inputs.items()}
            parts.append(Part(self.stack, some, piece, max(1, kept * size // sequences)))
            begin += size
        return parts

    @property
    def evaluations(self) -> float:
        """Cut models asked for so far; one evaluated on a tenth of the data counts as a tenth."""
        return self._evaluations

    @property
    def ahead(self) -> int:
        """How many other things to run while one is waited for; 0 for a single process."""
        return self._ranks.size - 1

    def sublayer_runs(self) -> float:
        """Sub-layers run so far by all ranks, which ask together; one on all calibration data counts as one."""
        mine = sum(part.runs * share for part, share in zip(self._parts, self._tokens_share, strict=True))
        told = self._ranks.gather({"runs": torch.tensor(mine, dtype=torch.float64)})
        return sum(float(part["runs"]) for part in told)

    def width(self, part: int) -> int:
        """Candidates that take about as long as one when they are evaluated together."""
        return max(1, min(_GPU_TOGETHER, _GPU_IDLE_TOKENS // self._parts[part].tokens)) if self._cuda else 1

    def begin(self, distance: str, advance: Callable[[float], None] | None = None) -> None:
        """Starts afresh from the dense model.

        Args:
            distance: name of the distance.
            advance: called with the number of cut models evaluated since its last call.
        Raises:
            UsageError: for a distance between probabilities where the model has no logits.
            EvaluationError: if the dense model's outputs are not numbers.
        """
        chosen = DISTANCES[distance]
        if chosen.probabilities and not self.stack.has_logits(self._parts[0].state):
            raise UsageError(
                f"`distance: {distance}` does not go with `{type(self.stack.model).__name__}`",
                why="it compares probabilities, and the model gives hidden states",
                hint="use `distance: angular` or `distance: norm`",
            )
        if chosen.text and not self.stack.model.can_generate():
            raise UsageError(
                f"`distance: {distance}` does not go with `{type(self.stack.model).__name__}`",
                why="it does not write text, so no next token can be compared",
                hint="use `distance: kl`",
            )
        left = self._reference_bytes
        for part in self._parts:
            left -= part.begin(chosen, left)
        self.distance = chosen
        self._advance = advance or (lambda amount: None)
        self._known = {}
        self.removed = frozenset()
        found = [self._on(part, [self.removed]) for part in self._parts]
        if any(math.isnan(float(total[0])) for total, _ in found):
            raise EvaluationError("the dense model's outputs are not numbers", hint="try `dtype: float32`")
        counts = [count for _, count in found]
        self.weights = tuple(count / sum(counts) for count in counts)
        self.base = tuple(0.0 for _ in counts)

    def measure(
        self,
        sets: Sequence[frozenset[str]],
        part: int,
        likely: Sequence[tuple[Sequence[frozenset[str]], int]] = (),
    ) -> list[float]:
        """Distances of models without these sub-layers on one part of the data; infinite where outputs overflow.

        Args:
            likely: further sets and parts that may be asked for soon. The other ranks run them meanwhile; what is asked
                for then is there, and what is not was in vain.
        """
        found = self._shared(self._work(sets, part), [work for some, at in likely for work in self._work(some, at)])
        self._count(len(sets), part)
        return found

    def whole(self, sets: Sequence[frozenset[str]]) -> list[tuple[float, ...]]:
        """Distances of models without these sub-layers on every part."""
        parts = range(len(self._parts))
        found = self._shared([work for part in parts for work in self._work(sets, part)])
        for part in parts:
            self._count(len(sets), part)
        return list(zip(*(found[part * len(sets) : (part + 1) * len(sets)] for part in parts), strict=True))

    def _work(self, sets: Sequence[frozenset[str]], part: int) -> list[Work]:
        group = max(1, self._batch_tokens // self._parts[part].tokens)
        return [(part, tuple(sets[first : first + group])) for first in range(0, len(sets), group)]

    def _shared(self, wanted: Sequence[Work], likely: Sequence[Work] = ()) -> list[float]:
        """Distances of all that is wanted, run by all ranks in turns together with what is likely wanted next."""
        new = [work for work in dict.fromkeys((*wanted, *likely)) if work not in self._known]
        if new:
            owners = self._owners(new)
            mine = {f"{n}": self._run(work) for n, work in enumerate(new) if self._ranks.mine(owners[n])}
            for part in self._ranks.gather(mine):
                self._known |= {new[int(n)]: values.tolist() for n, values in part.items()}
        found = {work: self._known.pop(work) for work in dict.fromkeys(wanted)}
        return [value for work in wanted for value in found[work]]

    def _owners(self, works: Sequence[Work]) -> list[int]:
        """Rank of each: the largest first, to whoever has least."""
        sizes = [self._parts[part].tokens * len(sets) for part, sets in works]
        owners, loads = [0] * len(works), [0] * self._ranks.size
        for n in sorted(range(len(works)), key=lambda n: -sizes[n]):
            owners[n] = loads.index(min(loads))
            loads[owners[n]] += sizes[n]
        return owners

    def _run(self, work: Work) -> Tensor:
        """Float64 [sets]."""
        part, sets = work
        total, count = self._on(self._parts[part], sets)
        return torch.where(total.isfinite(), total / count, math.inf).cpu()

    def _count(self, sets: int, part: int) -> None:
        amount = sets * self._tokens_share[part]
        self._evaluations += amount
        self._advance(amount)

    def distances(self, candidates: Sequence[tuple[str, ...]]) -> list[float]:
        """Distances on all data when these sub-layers go together with what is removed already."""
        return [self.mean(found) for found in self.whole([self.removed | set(units) for units in candidates])]

    def mean(self, by_part: Sequence[float]) -> float:
        """Distance on all data."""
        return sum(weight * value for weight, value in zip(self.weights, by_part, strict=True))

    def move(self, removed: frozenset[str], base: Sequence[float] | None = None) -> None:
        """Makes another cut model the current one.

        Args:
            removed: its missing sub-layers.
            base: its distance on every part, where it is known already.
        """
        for part in self._parts:
            part.move(removed)
        self._known = {}
        self.removed = removed
        self.base = tuple(base) if base is not None else self.whole([removed])[0]

    def cost(self, address: str, of: str) -> float:
        """What removing a sub-layer saves.

        Args:
            of: `params`, `flops`, `kv_bytes`, or `latency_ms`, which is measured once on the calibration data unless
                `cost` knows it.
        """
        if of != "latency_ms" or self._latency_known:
            return self._cost(address, of)
        if not self._latency:
            self._latency = self._measured_latency()
        return self._latency[address]

    def _on(self, part: Part, sets: Sequence[frozenset[str]]) -> tuple[Tensor, int]:
        with torch.no_grad():
            return part.distances(sets)

    def _measured_latency(self) -> dict[str, float]:
        """Milliseconds of every sub-layer; those of one shape share their median, so that noise orders nothing."""
        part = max(self._parts, key=lambda part: part.tokens)
        part.move(frozenset())
        shapes: dict[str, Any] = {}
        times: dict[Any, list[float]] = {}
        for i, hidden in part.inside():
            address = self.addresses[i]
            shapes[address] = self.stack.shape(i)
            for repeat in range(_REPEATS + 1):
                begin = self._now()
                self.stack.run(i, hidden, part.state)
                if repeat:
                    times.setdefault(shapes[address], []).append((self._now() - begin) * 1e3)
        part.move(self.removed)
        # Clocks differ; the search must not.
        mine = {address: torch.tensor(median(times[shape]), dtype=torch.float64) for address, shape in shapes.items()}
        return {address: float(value) for address, value in self._ranks.of_first(lambda: mine).items()}

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize(self.stack.model.device)
        return time.perf_counter()


def _least_free(device: torch.device, ranks: Ranks) -> int:
    """Bytes free on the fullest device, so that all ranks split the data alike."""
    told = ranks.gather({"free": torch.tensor(torch.cuda.mem_get_info(device)[0])})
    return min(int(part["free"]) for part in told)


def _sizes(sequences: int, least: int, growth: int, most: int) -> list[int]:
    """Sequences of each part: `least`, then `growth` times what came before, up to `most`; a small rest joins the last.

    _sizes(10, 1, 1, 8) = [1, 1, 2, 6].
    """
    sizes: list[int] = []
    left = sequences
    while left:
        size = min(max(least, growth * sum(sizes)), max(1, most), left)
        if left - size < size and left <= max(1, most):
            size = left
        sizes.append(size)
        left -= size
    return sizes


def _gpu_batch_tokens(model: Any, free: int) -> int:
    """Tokens that a quarter of the free memory holds: eight times the widest matrix of the blocks a token."""
    table = getattr(model.get_input_embeddings(), "weight", None)
    matrices = [p for p in model.base_model.parameters() if p.dim() == 2 and p is not table]
    widest = max(max(matrix.shape) for matrix in matrices)
    return max(1, min(2**18, free // 4 // (8 * widest * matrices[0].element_size())))
