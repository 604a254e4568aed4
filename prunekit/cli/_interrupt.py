"""Interruptions that are noticed although a callback of a library swallowed the exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_seen = threading.Event()


@contextmanager
def watched() -> Iterator[None]:
    """Remembers Ctrl-C while it lasts, so that `check` raises where the exception itself got lost.

    Python prints an exception inside a destructor or a callback from C, and goes on.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _seen.clear()


def _interrupted(number: int, frame: FrameType | None) -> None:
    _seen.set()
    raise KeyboardInterrupt


def check() -> None:
    """Raises KeyboardInterrupt if there was one; called where work advances."""
    if _seen.is_set():
        raise KeyboardInterrupt
