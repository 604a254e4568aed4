"""Clock and facts of the card that the attention benchmarks run on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
import triton
from record import asked

Run = Callable[[], object]
Way = TypeVar("Way", bound=Hashable)


class Device:
    """Clock and cache of the card, or stand-ins for them in a rehearsal."""

    def __init__(self, rehearse: bool) -> None:
        self.name, self.multiprocessors = "cpu" if rehearse else "cuda", 4
        if not rehearse:
            about = torch.cuda.get_device_properties(0)
            self.multiprocessors = about.multi_processor_count
            self.cold = torch.ones(getattr(about, "L2_cache_size", 50 * 2**20), device="cuda")

    def measure(self, run: Run) -> tuple[float, float, float, float, bool]:
        """Median, 20th and 80th percentile in us, scratch in MiB, whether a graph was replayed."""
        if self.name == "cpu":
            return *self._once(run), 0.0, False
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        scratch = (torch.cuda.max_memory_allocated() - before) / 2**20
        graph = self._captured(run)
        call = graph.replay if graph else run
        first = min(self.times(call, 3))
        return *_percentiles(self.times(call, min(60, max(12, int(30e3 / first))))), scratch, graph is not None

    def plain(self, run: Run) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile in us of a slow call, or of one that no graph holds."""
        if self.name == "cpu":
            return self._once(run)
        run()
        first = min(self.times(run, 2))
        return _percentiles(self.times(run, min(30, max(5, int(150e3 / first)))))

    def _once(self, run: Run) -> tuple[float, float, float]:
        start = time.perf_counter()
        run()
        taken = (time.perf_counter() - start) * 1e6
        return taken, taken, taken

    def _captured(self, run: Run) -> torch.cuda.CUDAGraph | None:
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                graph.capture_begin()
                try:
                    run()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            print(f"  timed without a graph: {str(error).splitlines()[0][:150]}", flush=True)
            return None
        torch.cuda.current_stream().wait_stream(side)
        return graph

    def times(self, call: Run, n: int) -> list[float]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]
        for start, end in marks:
            # A read leaves clean lines; written ones would go to memory at the expense of the call.
            self.cold.sum()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in marks]


def _percentiles(times: list[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    low, median, high = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double())
    return float(median), float(low), float(high)


def in_turns(ways: Iterable[Way], timed: Callable[[Way], float]) -> dict[Way, float]:
    """The shorter of two timings of each way, in turn forwards and backwards: a card that warms favours none."""
    forwards = list(ways)
    best: dict[Way, float] = {}
    for way in [*forwards, *reversed(forwards)]:
        best[way] = min(best.get(way, float("inf")), timed(way))
    return best


def poisoned(on: bool) -> None:
    """Whether memory that nobody wrote holds NaN from now on."""
    torch.use_deterministic_algorithms(on, warn_only=True)


def facts(commit: str) -> dict[str, str]:
    """Hardware and versions."""
    dirty = "-dirty" if asked("git", "status", "--porcelain", "--untracked-files=no") else ""
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver, clocks, power": asked("nvidia-smi", query, "--format=csv,noheader") or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or (asked("git", "rev-parse", "--short", "HEAD") or "unknown") + dirty,
    }
