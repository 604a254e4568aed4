"""How long work tells how far it is; who shows it lives in cli/."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: float = 1) -> None:
        """Counts work that is done, in the task's unit."""


class Progress(Protocol):
    """Where work reports."""

    def task(self, name: str, total: float | None = None, unit: str = "") -> AbstractContextManager[Task]:
        """A piece of work for the length of a `with` block.

        Args:
            name: what is done, in a word or two.
            total: how much there is; None where nobody knows.
            unit: what is counted, as a plural; `bytes` prints as KiB, MiB and so on.
        """


class _Silent:
    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "") -> Iterator[Task]:
        yield self

    def advance(self, amount: float = 1) -> None:
        pass


NULL_PROGRESS: Progress = _Silent()
