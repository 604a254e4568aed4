"""Starts the command in several processes that find each other, as a launcher does but without its own output."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


def together(
    words: Sequence[str], size: int = 2, timeout_s: float = 300, env: Mapping[str, str] | None = None
) -> list[Ended]:
    """Runs a command in so many processes, by rank.

    Args:
        words: arguments of Python; `{rank}` stands for the process's number.
        env: added to the environment.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(env or {})}
    shared |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    running = []
    for rank in range(size):
        mine = {} if size == 1 else {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(
            subprocess.Popen(
                [sys.executable, *(word.replace("{rank}", str(rank)) for word in words)],
                env={**shared, **mine},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told = [process.communicate(timeout=timeout_s) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(process.returncode, *both) for process, both in zip(running, told, strict=True)]
