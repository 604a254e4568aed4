"""Some of the calibration sequences: their hidden states in the cut model, and how far candidates are off on them."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from prunekit.calibrate.stack import Stack
from prunekit.search._distances import Distance

# Hidden states kept of a candidate that ran alone, and of how many candidates; more saves little more.
_PLACES = 8
_MOST_PATHS = 64


class Part:
    """Sequences that are run together.

    What enters every sub-layer of the current cut model is kept, so that a candidate runs only from the first sub-layer
    on that it changes; the same of the nearest candidate run alone since, which most likely becomes the current model;
    and a few hidden states of the last candidates run alone, which look the same in the next step up to what went.
    Candidates run as one batch that grows on its way down the stack: each joins where it parts from the current model.

    Args:
        stack: the model.
        inputs: its inputs by name, sequences first.
        piece_bytes: float32 outputs of one candidate held at a time.
        kept_bytes: hidden states kept. A quarter each for the current cut model and the nearest candidate, of which
            only every second, third, ... is kept where all are too many; the rest for the last candidates.
    """

    def __init__(self, stack: Stack, inputs: Mapping[str, Tensor], piece_bytes: int, kept_bytes: int) -> None:
        self.stack = stack
        self.runs = 0
        self._numbers = {address: i for i, address in enumerate(stack.addresses)}
        self.state = stack.enter(inputs)
        self.tokens = self.state.hidden.shape[0] * self.state.hidden.shape[1]
        self._piece_bytes = piece_bytes
        size = self.state.hidden.numel() * self.state.hidden.element_size()
        self._stride = -(-4 * len(stack.addresses) * size // kept_bytes)
        self._places = range(0, len(stack.addresses) + 1, -(-len(stack.addresses) // _PLACES))
        self._most_paths = min(_MOST_PATHS, kept_bytes // 2 // (_PLACES * size))
        self._paths: OrderedDict[frozenset[str], dict[int, Tensor]] = OrderedDict()
        self._removed: frozenset[str] = frozenset()
        self._trunk: list[Tensor | None] = [self.state.hidden] + [None] * len(stack.addresses)
        self._nearest: tuple[float, frozenset[str], dict[int, Tensor]] = (math.inf, frozenset(), {})
        self._path: dict[int, Tensor] = {}
        self._reference: list[Tensor] = []
        self._dense: Tensor | None = None
        self._lengths: list[int] = []

    def begin(self, distance: Distance, keep_bytes: int) -> int:
        """Runs the dense model, to compare with.

        Args:
            keep_bytes: its outputs are kept if they take no more than this, else made again for every comparison.
        Returns:
            Bytes of the outputs that are kept.
        """
        self._distance = distance
        self.move(frozenset())
        self._dense = self.stack.features(self._boundary(len(self.stack.addresses)), self.state)
        self._reference, kept, positions = [], 0, 0
        for piece in self._dense_pieces():
            positions += piece.shape[0]
            kept += piece.numel() * piece.element_size()
            if kept <= keep_bytes:
                self._reference.append(piece)
        if kept > keep_bytes:
            self._reference, kept = [], 0
        mask, sequences = self.state.mask, self.state.sequences
        a_sequence = positions // sequences
        self._lengths = [a_sequence] * sequences
        if mask is not None and positions == int(mask.sum()):
            self._lengths = mask.sum(1).tolist()
        return kept

    def move(self, removed: frozenset[str]) -> None:
        """Makes another cut model the current one; hidden states before the first difference stay."""
        first = self._first_change(removed, self._removed)
        self._trunk[first + 1 :] = [None] * (len(self._trunk) - first - 1)
        if removed == self._nearest[1]:
            for i, hidden in self._nearest[2].items():
                self._trunk[i] = hidden
        self._removed = removed
        self._nearest = (math.inf, frozenset(), {})

    def distances(self, sets: Sequence[frozenset[str]]) -> tuple[Tensor, int]:
        """Distances of models without these sub-layers from the dense model.

        Returns:
            Float64 [sets] and the count by which to divide them.
        """
        ends = self.stack.features(self._ends(sets), self.state)
        versions = ends.split(ends.shape[0] // len(sets))
        outputs = [self.stack.pieces(version, self.state, self._piece_bytes) for version in versions]
        values: list[list[Tensor]] = [[] for _ in sets]
        for reference in self._reference or self._dense_pieces():
            for output, found in zip(outputs, values, strict=True):
                found.append(self._distance.values(reference, next(output)))
        totals, count = self._distance.total(torch.stack([torch.cat(found) for found in values]), self._lengths)
        if len(sets) == 1 and float(totals[0]) < self._nearest[0]:
            self._nearest = (float(totals[0]), sets[0], self._path)
        self._path = {}
        return totals, count

    def inside(self) -> Iterator[tuple[int, Tensor]]:
        """Every sub-layer of the current cut model by number, and what enters it."""
        for i, address in enumerate(self.stack.addresses):
            if address not in self._removed:
                yield i, self._boundary(i)

    def _dense_pieces(self) -> Iterator[Tensor]:
        assert self._dense is not None
        following = self._following() if self._distance.text else None
        done = 0
        for piece in self.stack.pieces(self._dense, self.state, self._piece_bytes):
            end = done + piece.shape[0]
            yield self._distance.prepare(piece, None if following is None else following[done:end])
            done = end

    def _following(self) -> Tensor:
        """The token that comes next at every position that is not padding, -1 where none does, int64 [positions]."""
        ids, mask = self.state.inputs["input_ids"], self.state.mask
        after = torch.full_like(ids, -1)
        after[:, :-1] = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill(~mask[:, 1:], -1)
        return after.flatten() if mask is None else after[mask]

    def _first_change(self, one: frozenset[str], other: frozenset[str]) -> int:
        """Where two cut models part: the first sub-layer that only one of them has."""
        return min((self._numbers[address] for address in one ^ other), default=len(self._numbers))

    def _boundary(self, i: int) -> Tensor:
        """What enters sub-layer `i` in the current cut model."""
        known = next(j for j in range(i, -1, -1) if self._trunk[j] is not None)
        hidden = self._trunk[known]
        assert hidden is not None
        for j in range(known, i):
            if self.stack.addresses[j] not in self._removed:
                hidden = self._run(j, hidden, 1)
            if (j + 1) % self._stride == 0:
                self._trunk[j + 1] = hidden
        return hidden

    def _run(self, i: int, hidden: Tensor, versions: int) -> Tensor:
        self.runs += versions
        return self.stack.run(i, hidden, self.state)

    def _ends(self, sets: Sequence[frozenset[str]]) -> Tensor:
        """What leaves the last block of each cut model [sets x sequences, tokens, hidden]."""
        if len(sets) == 1:
            return self._end(sets[0])
        addresses = self.stack.addresses
        joins = []
        for removed in sets:
            start = join = self._first_change(removed, self._removed)
            while join < len(addresses) and addresses[join] in removed:
                join += 1
            joins.append((join, start))
        order = sorted(range(len(sets)), key=lambda k: joins[k])
        hidden = self.state.hidden[:0]
        active: list[int] = []
        for i in range(joins[order[0]][0], len(addresses) + 1):
            arriving = [k for k in order[len(active) :] if joins[k][0] == i]
            if arriving:
                hidden = torch.cat([hidden, *(self._boundary(joins[k][1]) for k in arriving)])
                active += arriving
            if i < len(addresses):
                hidden = self._step(i, hidden, [addresses[i] not in sets[k] for k in active])
        place = {k: row for row, k in enumerate(active)}
        if active == list(range(len(sets))):
            return hidden
        versions = hidden.split(self.state.sequences)
        return torch.cat([versions[place[k]] for k in range(len(sets))])

    def _end(self, removed: frozenset[str]) -> Tensor:
        """What leaves the last block of one cut model, from the last place on where something kept is the same."""
        place = self._first_change(removed, self._removed)
        path: dict[int, Tensor] = {}
        for other, kept in self._paths.items():
            same = self._first_change(removed, other)
            last = max((i for i in kept if i <= same), default=0)
            if last > place:
                place, path = last, {i: hidden for i, hidden in kept.items() if i <= last}
        hidden = path[place] if path else self._boundary(place)
        self._path = {}
        for i in range(place, len(self._numbers)):
            if self.stack.addresses[i] not in removed:
                hidden = self._run(i, hidden, 1)
            if (i + 1) % self._stride == 0:
                self._path[i + 1] = hidden
            if i + 1 in self._places:
                path[i + 1] = hidden
        self._paths[removed] = path
        self._paths.move_to_end(removed)
        while len(self._paths) > self._most_paths:
            self._paths.popitem(last=False)
        return hidden

    def _step(self, i: int, hidden: Tensor, has: list[bool]) -> Tensor:
        """One sub-layer on those versions that have it."""
        if all(has):
            return self._run(i, hidden, len(has))
        if not any(has):
            return hidden
        versions = list(hidden.split(self.state.sequences))
        ran = self._run(i, torch.cat([part for part, does in zip(versions, has, strict=True) if does]), sum(has))
        done = iter(ran.split(self.state.sequences))
        return torch.cat([next(done) if does else part for part, does in zip(versions, has, strict=True)])
