"""Clock and facts of the card that the attention benchmarks run on."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import triton

Run = Callable[[], object]


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
            start = time.perf_counter()
            run()
            return (*[(time.perf_counter() - start) * 1e6] * 3, 0.0, False)
        run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        scratch = (torch.cuda.max_memory_allocated() - before) / 2**20
        graph = self._captured(run)
        call = graph.replay if graph else run
        first = min(self.times(call, 3))
        times = torch.tensor(self.times(call, min(60, max(12, int(30e3 / first)))), dtype=torch.float64)
        low, median, high = (float(times.quantile(part)) for part in (0.2, 0.5, 0.8))
        return median, low, high, scratch, graph is not None

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


def facts(commit: str) -> dict[str, str]:
    """Hardware and versions."""

    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    dirty = "-dirty" if ask("git", "status", "--porcelain", "--untracked-files=no") else ""
    query = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.draw"
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver, clocks, power": ask("nvidia-smi", query, "--format=csv,noheader") or "unknown",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit or (ask("git", "rev-parse", "--short", "HEAD") or "unknown") + dirty,
    }
