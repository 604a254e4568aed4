"""What the sections share: rows, checks, one clock, one list of failed checks and one time limit."""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention_device import Device, Run, facts
from attention_ours import DIM, HEADS, KV_HEADS, POWER, draw, some_rows
from record import append
from torch import Tensor

from prunekit.runtime.attention.patterns.power import Power
from prunekit_kernels.block_sparse_prefill import cases

# Gradients sum products of two rounded matrices.
GRADIENT = 2e-2


class Bench:
    """The run: its options, its device, what was written and what failed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.rehearse, self.warm = options.rehearse, options.warm
        self.device = Device(options.rehearse)
        self.on = self.device.name
        self.heads, self.kv_heads = (4, 2) if self.rehearse else (HEADS, KV_HEADS)
        self.power, self.block = (Power(32, 2), 32) if self.rehearse else (POWER, 128)
        self.failed: list[str] = []
        # Variants that finished their checks in the process that compiled them; None if there was none.
        self.tried: set[str] | None = None
        self.marks: Path = options.out.with_suffix(".tried")
        self.rows: list[dict[str, Any]] = []
        self.matmul_tflops, self.copy_tb_s = 1.0, 1.0
        if not self.warm:
            options.out.write_text("")

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def keep(self, row: dict[str, Any]) -> None:
        """Adds a row to those of the run, unless it only compiles."""
        if not self.warm:
            self.rows.append(row)
            append(self.options.out, row)

    def write(self, row: dict[str, Any]) -> None:
        """Adds a row and prints what it says."""
        self.keep(row)
        if self.warm:
            return
        says = f"{row['median_ms']:9.4f} ms  {row.get('rate', '')}" if "median_ms" in row else row.get("error", "")
        print(f"{self.seconds():4.0f} s  {row['section']:9s} {row.get('shape', ''):28s} {row['what']:44s} {says}",
              flush=True)  # fmt: skip

    def draw(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        return draw(n, self.heads, self.kv_heads, self.on)

    def ceilings(self) -> None:
        """Measures the rates that floors are of, and writes them beside hardware and versions."""
        size = 256 if self.rehearse else 8192
        a, b = (torch.randn(size, size, device=self.on, dtype=torch.bfloat16) for _ in range(2))
        self.matmul_tflops = 2 * size**3 / self.device.measure(lambda: a @ b)[0] / 1e6
        source = torch.ones(2**16 if self.rehearse else 2**29, device=self.on)
        target = torch.empty_like(source)
        self.copy_tb_s = 2 * source.nbytes / self.device.measure(lambda: target.copy_(source))[0] / 1e6
        about = facts(self.options.commit) | {
            "matmul_tflops": round(self.matmul_tflops), "copy_tb_s": round(self.copy_tb_s, 2), "heads": self.heads,
            "kv_heads": self.kv_heads, "dim": DIM, "dtype": "bfloat16",
        }  # fmt: skip
        self.write({"section": "about", "what": "facts", **about})


@dataclass(frozen=True)
class Part:
    """What a section does at one shape, or its checks, which have none."""

    bench: Bench
    section: str
    shape: str = ""

    @contextmanager
    def case(self, what: str) -> Iterator[None]:
        """Turns whatever goes wrong inside into a row."""
        try:
            if self.bench.seconds() > self.bench.options.seconds:
                raise TimeoutError("no time left")
            yield
        except Exception as error:  # one case must not cost the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).strip()[:300]} ({Path(where.filename).name}:{where.lineno})"
            self.write(what, error=text)
            if "illegal" in text or "misaligned" in text or "unspecified launch failure" in text:
                print("the device is lost", flush=True)
                raise SystemExit(1) from error

    def write(self, what: str, **more: Any) -> None:
        self.bench.write({"section": self.section, "shape": self.shape, "what": what, **more})

    def check(self, name: str, got: Tensor, expected: Tensor, limit: float) -> bool:
        """Notes a result that is further off than `limit`, relative to the norm."""
        error = cases.relative_error(got, expected)
        good = error <= limit
        row = {"section": self.section, "what": f"check {name}", "relative_error": error, "limit": limit,
               "passed": good}  # fmt: skip
        if not good:
            self.bench.failed.append(f"{self.section}: {name} is {error:.2e} off, limit {limit:.0e}")
            row["error"] = self.bench.failed[-1]
        self.bench.keep(row)
        return good

    def check_rows(
        self, name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, rule: Callable[[Tensor], Tensor]
    ) -> bool:
        """Some rows of a full-size result against float32; `rule` gives the mask [1 or H, rows, T] of positions."""
        n, good = q.shape[2], bool(torch.isfinite(out).all())
        if not good:
            self.bench.failed.append(f"{self.section}: {name} is not finite everywhere")
        for run, expected, _ in some_rows(q, k, v, rule, (0, n // 2 + 5, n - 32), 32):
            good &= self.check(f"{name} rows {run.start}", out[0, :, run], expected, 8e-3)
        return good

    def time(
        self, what: str, run: Run, *, flops: float = 0.0, size: float = 0.0, plain: bool = False, **more: Any
    ) -> float:
        """Times a call, cold L2, a CUDA graph where it can be captured; returns the median in ms.

        Args:
            flops: of the call; adds a rate and a floor at the measured product rate.
            size: bytes that the call touches; adds a rate and a floor at the measured copy rate.
            plain: whether no graph is tried.
            more: further fields of the row.
        """
        bench = self.bench
        if bench.warm:
            run()
            torch.cuda.synchronize()
            return 1.0
        graph = False
        if plain:
            median, low, high = bench.device.plain(run)
        else:
            median, low, high, _, graph = bench.device.measure(run)
        row: dict[str, Any] = {
            "median_ms": median / 1e3, "p20_ms": low / 1e3, "p80_ms": high / 1e3, "graph": graph,
            "time_at_s": round(bench.seconds()),
        }  # fmt: skip
        if flops:
            row |= {"rate": f"{flops / median / 1e6:.0f} TFLOP/s", "floor_ms": flops / bench.matmul_tflops / 1e9}
        if size:
            row |= {"rate": f"{size / median / 1e6:.2f} TB/s", "floor_ms": size / bench.copy_tb_s / 1e9}
        self.write(what, **row, **more)
        return median / 1e3

    def failed(self) -> bool:
        """Whether a check of the section failed."""
        return any(line.startswith(self.section) for line in self.bench.failed)

    def ratios(self, found: dict[str, float]) -> None:
        """One row of ratios to each peer, unless a check of the section failed."""
        peers = {n: t for n, t in found.items() if n.startswith(("flex", "flash-attn", "dense", "natten"))}
        mine = {n: t for n, t in found.items() if n not in peers}
        if self.failed():
            self.write("ratios", error="a check failed, so none")
        elif peers and mine:
            table = {n: {p: round(other / t, 3) for p, other in peers.items()} for n, t in mine.items()}
            self.write("times as fast as", ratios=table)
