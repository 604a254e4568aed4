"""What may go next: sub-layers, blocks, or pairs that leave attention and FFN taking turns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

# Kinds of candidate that keep to a kind of unit; pairs are what sub-layers go by where they must go on taking turns.
ALLOWED = {
    "sublayers": ("sublayers", "attention", "ffn", "blocks", "pairs", "mixed"),
    "pairs": ("pairs", "blocks"),
    "blocks": ("blocks",),
    "attention": ("attention",),
    "ffn": ("ffn",),
}
Units = tuple[str, ...]


def candidates(kind: str, addresses: Sequence[str], removed: frozenset[str], kept: frozenset[str]) -> list[Units]:
    """Units that may go next, in execution order.

    Args:
        kind: `sublayers`, `attention`, `ffn`, `blocks`, `pairs` (an attention and an FFN that follow each other, where
            those left still take turns) or `mixed` (sub-layers, and pairs whatever is left).
        addresses: sub-layers of the dense model in execution order.
        removed: those that are gone.
        kept: those that must stay.
    Returns:
        Addresses that go together; at least one sub-layer of the model stays.
    """
    alive = [address for address in addresses if address not in removed]
    found: list[Units] = []
    if kind == "blocks":
        blocks: dict[str, list[str]] = {}
        for address in alive:
            blocks.setdefault(address.rpartition(".")[0], []).append(address)
        found = [tuple(units) for units in blocks.values()]
    elif kind in ("sublayers", "mixed"):
        found = [(address,) for address in alive]
    elif kind in ("attention", "ffn"):
        found = [(address,) for address in alive if kind_of(address) == kind]
    if kind == "pairs":
        found = [pair for pair in pairwise(alive) if take_turns(a for a in alive if a not in pair)]
    elif kind == "mixed":
        found += [pair for pair in pairwise(alive) if kind_of(pair[0]) != kind_of(pair[1])]
    return [units for units in found if len(units) < len(alive) and not kept.intersection(units)]


def kind_of(address: str) -> str:
    """`attention` or `ffn`."""
    return address.rpartition(".")[2]


def take_turns(addresses: Iterable[str]) -> bool:
    """Whether these are an attention, an FFN, an attention and so on, up to an FFN."""
    kinds = [kind_of(address) for address in addresses]
    return kinds == ["attention", "ffn"] * (len(kinds) // 2)


def ordered(units: Iterable[Units], kind: str, addresses: Sequence[str], kept: frozenset[str]) -> list[Units] | None:
    """The units in an order in which each is a candidate when its turn comes; None if there is no such order.

    Args:
        units: addresses that go together, in the order that is wanted.
        kind: as for `candidates`.
    """
    waiting, removed, done = list(units), frozenset[str](), []
    while waiting:
        allowed = set(candidates(kind, addresses, removed, kept))
        chosen = next((part for part in waiting if part in allowed), None)
        if chosen is None:
            return None
        waiting.remove(chosen)
        removed |= set(chosen)
        done.append(chosen)
    return done


def front(addresses: Sequence[str], kind: str, protect: float) -> tuple[frozenset[str], int]:
    """Sub-layers at the front that are withheld at first, and how many must be gone before they are handed back.

    The paper's rule for n sub-layers: the first floor(n x protect / 2) + 1 blocks are withheld until
    floor(n x protect) + 1 sub-layers are gone. Where only one kind of sub-layer may go, n counts that kind, one in a
    block.

    Args:
        protect: the paper's rate; 0 withholds nothing.
    """
    if not protect:
        return frozenset(), 0
    may_go = [address for address in addresses if kind not in ("attention", "ffn") or kind_of(address) == kind]
    in_block = 1 if kind in ("attention", "ffn") else 2
    count = math.floor(len(may_go) * protect + 1e-9)
    blocks = list(dict.fromkeys(address.rpartition(".")[0] for address in addresses))[: count // in_block + 1]
    withheld = frozenset(address for address in addresses if address.rpartition(".")[0] in blocks)
    return withheld, count + 1
