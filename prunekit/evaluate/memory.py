"""Peak memory of a piece of work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class PeakMemory:
    """Filled in when the measured block ends.

    Args:
        host_bytes: largest resident memory of the process while the block ran, what was there before included. Where
            the system cannot restart its counter (anything but Linux), the largest since the process began.
        device_bytes: largest memory that tensors took on the GPU while the block ran; None without one.
    """

    host_bytes: int = 0
    device_bytes: int | None = None


@contextmanager
def peak_memory(device: str | torch.device = "cpu") -> Iterator[PeakMemory]:
    """Measures the peak memory of the block under `with`.

    Args:
        device: `cuda` or `cuda:1` measures that GPU too.
    """
    found, cuda = PeakMemory(), torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    _restart_host_peak()
    try:
        yield found
    finally:
        found.host_bytes = _host_peak()
        if cuda:
            found.device_bytes = torch.cuda.max_memory_allocated(device)


def _restart_host_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _host_peak() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
