"""Hidden states at block boundaries, sequence by sequence."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from prunekit.core.progress import Task
from prunekit.evaluate.diagnostics._subject import Subject


def boundaries(subject: Subject, task: Task) -> Iterator[tuple[str, Tensor]]:
    """`input` and what enters the first block, then every block and what leaves it, float32 [tokens, hidden].

    Args:
        subject: the model.
        task: advances by a sequence whenever one is through.
    """
    addresses = subject.stack.addresses
    owners = [address.rpartition(".")[0] for address in addresses]
    place = 0
    for visit in subject.visits():
        if place == 0:
            yield "input", visit.before
        if place + 1 == len(addresses) or owners[place + 1] != owners[place]:
            yield owners[place], visit.after
        place += 1
        if place == len(addresses):
            place = 0
            task.advance()
