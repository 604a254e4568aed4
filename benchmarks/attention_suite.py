"""Every attention kernel on one GPU beside the strongest peers, in one run of under five minutes; tests first.

    python benchmarks/attention_suite.py --out rows.jsonl [--seconds 285] [--only power decode scored backward grid]

Sections, in the order of what would be missed most: power prefill (variants of the Hopper and portable kernels), one
decode step at batch 8 and 1 with and without the choosing of pages, scored prefill end to end, gradients, two- and
three-dimensional neighbourhoods. Llama-3-8B heads (32 query, 8 key-value, size 128), bfloat16. Each section checks its
kernels against float64 or float32 before it times them; a section whose check failed gets no ratios. A case that fails
becomes a row with the error's text and costs no other case. Rows are written as they come. `--rehearse` runs the whole
script on tiny shapes without a GPU, under TRITON_INTERPRET=1; its times mean nothing. Long, because sections share
one clock, one list of failed checks and one time limit.

The kernels are compiled first, all sections at once in processes of their own, so that the run itself finds them in the
compilers' caches; `--no-warm` leaves that out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
from attention_device import Device, Run, facts
from attention_peers import BACKENDS, compiled_flex, dense, flex_mask, power_rule, tile_rule
from torch import Tensor, nn

from prunekit.runtime.attention.decode import step
from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit.runtime.attention.patterns.antidiagonal import Antidiagonal
from prunekit.runtime.attention.patterns.block_topk import BlockTopk
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.neighborhood import Neighborhood
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.quest import Quest
from prunekit_kernels.block_scores import portable as scores_portable
from prunekit_kernels.block_scores import reference as scores_reference
from prunekit_kernels.block_scores import scored_lists, select_blocks
from prunekit_kernels.block_sparse_prefill import BlockLists, backward, block_sparse_prefill, cases, portable
from prunekit_kernels.block_sparse_prefill.reference import backward_reference, masked_attention, reference
from prunekit_kernels.page_summaries import block_means, page_bounds
from prunekit_kernels.page_summaries.reference import bounds_reference, means_reference
from prunekit_kernels.permute import permute_tokens
from prunekit_kernels.sparse_decode import PageLists, sparse_decode
from prunekit_kernels.sparse_decode.reference import decode_reference

HEADS, KV_HEADS, DIM, SCALE = 32, 8, 128, 128**-0.5
# Gradients sum products of two rounded matrices.
GRADIENT = 2e-2


class Suite:
    """Rows, checks, clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.rehearse = options.rehearse
        self.device = Device(options.rehearse)
        self.on = self.device.name
        self.heads, self.kv_heads = (4, 2) if self.rehearse else (HEADS, KV_HEADS)
        self.failed: list[str] = []
        # Variants that finished their checks in the process that compiled them; None if there was none.
        self.tried: set[str] | None = None
        self.marks = options.out.with_suffix(".tried")
        self.rows: list[dict[str, Any]] = []
        self.matmul_tflops, self.copy_tb_s = 1.0, 1.0
        self.power = Power(32, 2) if self.rehearse else Power(block_tokens=128, window_blocks=8, sink_blocks=1)
        if not options.warm:
            options.out.write_text("")

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def write(self, row: dict[str, Any]) -> None:
        if self.options.warm:
            return
        self.rows.append(row)
        with self.options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        figures = f"{row['median_ms']:9.4f} ms  {row.get('rate', '')}" if "median_ms" in row else row.get("error", "")
        print(f"{self.seconds():4.0f} s  {row['section']:9s} {row.get('shape', ''):28s} {row['what']:44s} {figures}",
              flush=True)  # fmt: skip

    @contextmanager
    def case(self, section: str, what: str, shape: str = "") -> Iterator[None]:
        """Turns whatever goes wrong inside into a row."""
        try:
            if self.seconds() > self.options.seconds:
                raise TimeoutError("no time left")
            yield
        except Exception as error:  # one case must not cost the others
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).strip()[:300]} ({Path(where.filename).name}:{where.lineno})"
            self.write({"section": section, "what": what, "shape": shape, "error": text})
            if "illegal" in text or "misaligned" in text or "unspecified launch failure" in text:
                print("the device is lost", flush=True)
                raise SystemExit(1) from error

    def check(self, section: str, name: str, got: Tensor, expected: Tensor, limit: float) -> bool:
        """Notes a result that is further off than `limit`, relative to the norm."""
        error = cases.relative_error(got, expected)
        good = error <= limit
        row = {"section": section, "what": f"check {name}", "relative_error": error, "limit": limit, "passed": good}
        if not good:
            self.failed.append(f"{section}: {name} is {error:.2e} off, limit {limit:.0e}")
            row["error"] = self.failed[-1]
        if self.options.warm:
            return good
        self.rows.append(row)
        with self.options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return good

    def time(self, section: str, shape: str, what: str, run: Run, **more: Any) -> float:
        """Times a call, cold L2, a CUDA graph where it can be captured; returns the median in ms.

        Keyword `flops` adds a rate and a floor at the measured product rate, `size` in bytes one at the copy rate.
        """
        if self.options.warm:
            run()
            torch.cuda.synchronize()
            return 1.0
        if more.pop("plain", False) or self.on == "cpu":
            median, low, high = self.plain(run)
            graph = False
        else:
            median, low, high, _, graph = self.device.measure(run)
        row = {"section": section, "shape": shape, "what": what, "median_ms": median / 1e3, "p20_ms": low / 1e3,
               "p80_ms": high / 1e3, "graph": graph, "time_at_s": round(self.seconds())}  # fmt: skip
        flops, size = more.pop("flops", 0.0), more.pop("size", 0.0)
        if flops:
            row |= {"rate": f"{flops / median / 1e6:.0f} TFLOP/s", "floor_ms": flops / self.matmul_tflops / 1e9}
        if size:
            row |= {"rate": f"{size / median / 1e6:.2f} TB/s", "floor_ms": size / self.copy_tb_s / 1e9}
        self.write(row | more)
        return median / 1e3

    def plain(self, run: Run) -> tuple[float, float, float]:
        """Median, 20th and 80th percentile in us of a call that is not captured."""
        run()
        if self.on == "cpu":
            start = time.perf_counter()
            run()
            return (((time.perf_counter() - start) * 1e6),) * 3
        first = min(self.device.times(run, 2))
        times = torch.tensor(self.device.times(run, min(30, max(5, int(150e3 / first)))), dtype=torch.float64)
        low, median, high = (float(times.quantile(part)) for part in (0.2, 0.5, 0.8))
        return median, low, high

    def draw(self, n: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(n)
        shapes = [(batch, heads, n, DIM) for heads in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (torch.randn(shape, device=self.on, dtype=torch.bfloat16) for shape in shapes)
        return q, k, v

    def ceilings(self) -> None:
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

    def variants(self) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
        """Our prefill kernels by name, called with q, k, v and lists without tables or biases."""

        def tiled(tile: portable.Tile) -> Callable[..., tuple[Tensor, Tensor]]:
            def run(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists) -> tuple[Tensor, Tensor]:
                return portable.launch(
                    q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, None, None,
                    lists.block_q, lists.block_k, lists.q_offset, lists.causal, SCALE, tile,
                )  # fmt: skip

            return run

        def hopper(**how: Any) -> Callable[..., tuple[Tensor, Tensor]]:
            def run(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists) -> tuple[Tensor, Tensor]:
                from prunekit_kernels.block_sparse_prefill import hopper_launch

                return hopper_launch.launch(
                    q,
                    k,
                    v,
                    lists.counts,
                    lists.partials,
                    lists.indices,
                    lists.mask_ids,
                    lists.masks,
                    lists.q_offset,
                    lists.causal,
                    SCALE,
                    **how,
                )

            return run

        if self.rehearse:
            return {"portable": tiled(portable.Tile(16, 4, 2))}
        found = {
            "hopper": hopper(rows_first=None),
            "portable 128x128 w8 s2": tiled(portable.Tile(128, 8, 2)),
            "portable 128x64 w8 s3": tiled(portable.Tile(64, 8, 3)),
        }
        # Not the default: a kernel that hangs must do so in a process that can be ended.
        new = {"hopper, heads first": hopper(rows_first=False)}
        return found | {name: run for name, run in new.items() if self.tried is None or name in self.tried}

    # Power

    def check_forward(self) -> list[str]:
        """Names of the variants that are right on ragged shapes."""
        good = []
        small = cases.Case(1, 4, 2, 70, 70, 128, block_q=32, block_k=32)
        chosen = [small] if self.rehearse else [
            cases.Case(2, 8, 2, 1000, 1000, 128), cases.Case(1, 4, 1, 200, 1111, 128, per_head=True),
            cases.Case(1, 4, 1, 63, 63, 128), cases.Case(1, 16, 4, 4097, 4097, 128),
        ]  # fmt: skip
        poisoned(True)
        for name, run in self.variants().items():
            with self.case("power", f"check {name}"):
                right = True
                for number, case in enumerate(chosen):
                    q, k, v, lists, _, _ = cases.make(case, torch.bfloat16, self.on, number + 1)
                    expected, sums = reference(q.double(), k.double(), v.double(), lists, SCALE)
                    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
                    out, lse = run(q, k, v, lists)
                    right &= self.check("power", f"{name} {case.name}", out, expected, cases.RELATIVE[out.dtype])
                    right &= self.check("power", f"{name} {case.name} lse", lse, sums, 1e-3)
                if self.options.warm:
                    torch.cuda.synchronize()
                    with self.marks.open("a") as file:
                        file.write(name + "\n")
                good += [name] * right
        poisoned(False)
        return good

    def check_rows(self, section: str, name: str, out: Tensor, q: Tensor, k: Tensor, v: Tensor, rule: Any) -> bool:
        """Some rows of a full-size result against float32; `rule` gives the mask [1 or H, rows, T] of positions."""
        n, good = q.shape[2], bool(torch.isfinite(out).all())
        if not good:
            self.failed.append(f"{section}: {name} is not finite everywhere")
        for first in (0, n // 2 + 5, n - 32):
            rows = torch.arange(first, min(first + 32, n), device=self.on)
            expected, _ = masked_attention(q[0, :, rows].float(), k[0].float(), v[0].float(), rule(rows), SCALE)
            good &= self.check(section, f"{name} rows {first}", out[0, :, rows], expected, 8e-3)
        return good

    def prefill(self, n: int, names: list[str]) -> None:
        shape = f"B1 S{n}"
        q, k, v = self.draw(n)
        size = 32 if self.rehearse else 128
        lists = block_lists(self.power, n, n, block_q=size, block_k=size, device=self.on)
        touched = 4.0 * DIM * size * size * lists.touched * self.heads
        whole = 4.0 * DIM * n * (n + 1) / 2 * self.heads
        keys = torch.arange(n, device=self.on)
        found: dict[str, float] = {}
        variants = self.variants()
        for name in [*names, *names[:1]]:
            with self.case("power", name, shape):
                again = " again" * (name in found)
                out = variants[name](q, k, v, lists)[0]
                rule = lambda rows: self.power.allows(rows[:, None], keys[None, :])[None]  # noqa: E731
                if again or self.check_rows("power", f"{name} {n}", out, q, k, v, rule):
                    found[name + again] = self.time(
                        "power", shape, name + again, lambda name=name: variants[name](q, k, v, lists), flops=touched
                    )
        with self.case("power", "flex power", shape):
            flex = compiled_flex()
            mask = flex_mask(lists, power_rule(self.power))
            peer = lambda: flex(q, k, v, block_mask=mask, enable_gqa=True)  # noqa: E731
            self.check("power", f"flex {n}", peer(), block_sparse_prefill(q, k, v, lists)[0], 1e-2)
            found["flex power"] = self.time("power", shape, "flex power", peer, flops=touched)
        with self.case("power", "flash-attn-4 power", shape):
            from attention_prefill import flash4_power

            call = flash4_power(q, k, v, lists)
            self.check("power", f"flash-attn-4 {n}", call(), block_sparse_prefill(q, k, v, lists)[0], 1e-2)
            found["flash-attn-4 power"] = self.time("power", shape, "flash-attn-4 power", call, flops=touched)
        for name, backend in BACKENDS.items():
            with self.case("power", name, shape):
                found[name] = self.time("power", shape, name, dense(backend, q, k, v), flops=whole, plain=n > 2**16)
        self.ratios("power", shape, found)

    def failed_in(self, section: str) -> bool:
        """Whether a check of a section failed."""
        return any(line.startswith(section) for line in self.failed)

    def ratios(self, section: str, shape: str, found: dict[str, float]) -> None:
        """One row of ratios to each peer, unless a check of the section failed."""
        peers = {n: t for n, t in found.items() if n.startswith(("flex", "flash-attn", "dense", "natten"))}
        mine = {n: t for n, t in found.items() if n not in peers}
        if self.failed_in(section):
            self.write({"section": section, "what": "ratios", "shape": shape, "error": "a check failed, so none"})
        elif peers and mine:
            table = {n: {p: round(other / t, 3) for p, other in peers.items()} for n, t in mine.items()}
            self.write({"section": section, "what": "times as fast as", "shape": shape, "ratios": table})

    def section_power(self) -> None:
        names = self.check_forward()
        for n in (96,) if self.rehearse else (32768, 131072, 8192):
            self.prefill(n, names)
            torch._dynamo.reset()

    # Decode

    def section_decode(self) -> None:
        with self.case("decode", "check"):
            self.check_decode()
        shapes = ((2, 256),) if self.rehearse else ((8, 131072), (8, 32768), (8, 8192), (1, 131072))
        for batch, context in shapes:
            self.decode(batch, context)

    def check_decode(self) -> None:
        """Scores, choice and attention of a step under Quest against float64."""
        torch.manual_seed(3)
        q, k, v = (torch.randn(2, h, n, DIM, dtype=torch.float16) for h, n in ((8, 1), (2, 1111), (2, 1111)))
        pattern, here = Quest(16, 256), [t.to(self.on) for t in (q, k, v)]
        scores = pattern.page_scores(here[0], pattern.summaries(here[1]))
        wide = pattern.page_scores(q.double(), pattern.summaries(k.double()))
        self.check("decode", "page scores", scores.cpu(), wide, 2e-3)
        table = select_blocks(scores.flatten(0, 1).unsqueeze(1), 1, 1111, block_q=1, block_k=16, q_offset=1110, keep=16,
                              sink=0, ascending=True)[2][:, 0, :16].unflatten(0, (2, 2))  # fmt: skip
        lists = PageLists.from_table(table, torch.full((2, 2), 247, device=self.on), 2, 16, paged=False)
        expected, _ = decode_reference(
            *(t.double() for t in here), lists.indices, lists.starts, lists.tokens, 16, False, SCALE
        )
        self.check("decode", "quest step", step(pattern, nn.Module(), *here, None, SCALE), expected, 2e-3)
        low, high = page_bounds(k.to(self.on), 16)
        for name, mine, other in zip(("low", "high"), (low, high), bounds_reference(k, 16), strict=True):
            self.check("decode", f"page bounds {name}", mine.cpu(), other, 0.0)
        scores = torch.randn(40, 1, 700)
        mine = select_blocks(scores.to(self.on), 1, 11193, block_q=1, block_k=16, q_offset=11192, keep=50,
                             ascending=True)  # fmt: skip
        other = scores_reference.select_reference(
            scores, 1, 16, 1, 11193, 11192, True, 50, 0.0, 1, 1, mine[2].shape[-1], True
        )
        for name, a, b in zip(("counts", "partials", "indices"), mine, other, strict=True):
            self.check("decode", f"select {name}", a.cpu().float(), b.float(), 0.0)

    def decode(self, batch: int, context: int) -> None:
        shape = f"B{batch} T{context}"
        budget = 64 if self.rehearse else 2048
        pattern = Quest(16, budget)
        torch.manual_seed(1)
        q = torch.randn(batch, self.heads, 1, DIM, device=self.on, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, self.kv_heads, context, DIM, device=self.on, dtype=torch.bfloat16) for _ in "kv")
        found: dict[str, float] = {}
        row = 4 * DIM * batch * self.kv_heads
        n_pages = context // 16
        keep = budget // 16

        def choose() -> Tensor:
            scores = pattern.page_scores(q, bounds)
            return select_blocks(scores.flatten(0, 1).unsqueeze(1), 1, context, block_q=1, block_k=16,
                                 q_offset=context - 1, keep=keep, sink=0, ascending=True)[2]  # fmt: skip

        def lists_of(table: Tensor) -> PageLists:
            pages = table[:, 0, :keep].unflatten(0, (batch, self.kv_heads))
            return PageLists.from_table(pages, counts, self.kv_heads, 16, paged=False)

        with self.case("decode", "page bounds", shape):
            bounds = page_bounds(k, 16)
            self.time(
                "decode", shape, "page bounds of the whole cache", lambda: page_bounds(k, 16), size=row * context / 2
            )
        with self.case("decode", "attention", shape):
            counts = torch.full((batch, self.kv_heads), budget, dtype=torch.int32, device=self.on)
            lists = lists_of(choose())
            found["attention to 2048 tokens"] = self.time(
                "decode", shape, f"attention to {budget} tokens", lambda: sparse_decode(q, k, v, lists, scale=SCALE),
                size=row * budget,
            )  # fmt: skip
        with self.case("decode", "choosing", shape):
            size = row * n_pages
            scored = self.time("decode", shape, "page scores", lambda: pattern.page_scores(q, bounds), size=size)
            chosen = self.time("decode", shape, "scores and top pages", choose, size=size)
            self.write(
                {"section": "decode", "shape": shape, "what": "top pages alone", "by_difference_ms": chosen - scored}
            )
        with self.case("decode", "step", shape):
            found["step, choosing included"] = self.time(
                "decode", shape, "step, choosing included",
                lambda: sparse_decode(q, k, v, lists_of(choose()), scale=SCALE), size=row * (budget + n_pages),
            )  # fmt: skip
        with self.case("decode", "whole list", shape):
            whole = PageLists.whole(torch.full((batch, self.kv_heads), context, device=self.on), context)
            found["whole list"] = self.time(
                "decode", shape, "whole list", lambda: sparse_decode(q, k, v, whole, scale=SCALE), size=row * context
            )
        for name, backend in BACKENDS.items():
            with self.case("decode", name, shape):
                run = dense(backend, q, k, v, causal=False)
                found[name] = self.time("decode", shape, name, run, size=row * context)
        self.ratios("decode", shape, found)

    # Scored prefill

    def check_scores(self) -> None:
        """Scores, means and lists on a ragged shape against the references."""
        torch.manual_seed(5)
        n = 300 if self.rehearse else 1111
        q, k = (torch.randn(1, h, n, DIM, dtype=torch.bfloat16) for h in (8, 2))
        here = [t.to(self.on) for t in (q, k)]
        square = scores_portable.Tile(128, 128, 64, 8, 3)
        for stride, every in (
            ((16, 1), (16, 4)) if self.rehearse else ((16, 1), (16, 2), (16, 4), (8, 8), (32, 1), (64, 1))
        ):
            how = (stride, every, 128, 128, 0, True, SCALE)
            expected = scores_reference.folded_scores(q.double(), k.double(), *how)
            for tile in (None,) if self.rehearse or (stride, every) != (16, 1) else (None, square):
                got = scores_portable.folded(*here, *how, tile)
                self.check("scored", f"antidiagonal scores {stride} {every} {tile or ''}", got.cpu(), expected, 2e-3)
        fine = k.half()
        means = block_means(fine.to(self.on), 128)
        self.check("scored", "means", means.cpu(), means_reference(fine.double(), 128), 1e-3)
        for keep, mass in ((3, 0.0), (0, 0.5), (0, 0.0)):
            given = torch.randint(-8 if not mass else 0, 64, (4, 9, 9)).float() / 64
            width = 9 if not keep else min(9, max(keep, 4))
            arguments = (128, 128, n, n, 0, True, keep, mass, 1, 1, width, False)
            mine = scores_portable.select(given.to(self.on), *arguments)
            for name, a, b in zip("cpi", mine, scores_reference.select_reference(given, *arguments), strict=True):
                self.check("scored", f"select {keep} {mass} {name}", a.cpu().float(), b.float(), 0.0)

    def section_scored(self) -> None:
        with self.case("scored", "check"):
            self.check_scores()
        for n in (300,) if self.rehearse else (131072, 32768):
            self.scored(n)

    def scored(self, n: int) -> None:
        shape = f"B1 S{n}"
        q, k, v = self.draw(n)
        blocks = -(-n // 128)
        found: dict[str, float] = {}
        # Rows of r blocks keep min(r, keep): a tenth of the triangle.
        keep = max(1, round(blocks * (1 - 0.9**0.5)))
        patterns = {
            "block_topk": BlockTopk(keep_blocks=keep), "antidiagonal": Antidiagonal(stride=16, keep_blocks=keep),
            "antidiagonal, stride 32": Antidiagonal(stride=32, keep_blocks=keep),
            "antidiagonal, stride 64": Antidiagonal(stride=64, keep_blocks=keep),
            "antidiagonal, one run in 2": Antidiagonal(keep_blocks=keep, query_step=2),
            "antidiagonal, one run in 4": Antidiagonal(keep_blocks=keep, query_step=4),
            "antidiagonal, stride 8, one run in 8": Antidiagonal(stride=8, keep_blocks=keep, query_step=8),
        }  # fmt: skip
        parts: dict[str, dict[str, float]] = {}
        keys = torch.arange(n, device=self.on)
        for name, pattern in patterns.items():
            with self.case("scored", name, shape):
                scoring = self.time("scored", shape, f"{name}: scores and lists",
                                    lambda pattern=pattern: pattern.prompt_lists(q, k, SCALE))  # fmt: skip
                lists = pattern.prompt_lists(q, k, SCALE)
                pairs = lists.touched / (self.heads * blocks * (blocks + 1) / 2)
                flops = 4.0 * DIM * 128 * 128 * lists.touched
                out = block_sparse_prefill(q, k, v, lists, scale=SCALE)[0]
                listed = torch.zeros(self.heads, blocks, blocks, dtype=torch.bool, device=self.on)
                at = torch.arange(lists.indices.shape[2], device=self.on) < lists.counts[..., None]
                head, row, slot = at.nonzero(as_tuple=True)
                listed[head, row, lists.indices[head, row, slot].long()] = True
                rule = lambda rows, listed=listed: (  # noqa: E731
                    listed[:, rows // 128][:, :, keys // 128] & (keys[None, None] <= rows[None, :, None])
                )
                self.check_rows("scored", f"{name} {n}", out, q, k, v, rule)
                attention = self.time("scored", shape, f"{name}: attention",
                                      lambda lists=lists: block_sparse_prefill(q, k, v, lists, scale=SCALE),
                                      flops=flops, density=pairs)  # fmt: skip
                found[name] = self.time(
                    "scored", shape, f"{name}: all",
                    lambda pattern=pattern: block_sparse_prefill(
                        q, k, v, pattern.prompt_lists(q, k, SCALE), scale=SCALE
                    ), density=pairs, scoring_share=scoring / (scoring + attention),
                )  # fmt: skip
                parts[name] = {"scores_ms": scoring, "attention_ms": attention, "all_ms": found[name],
                               "share": scoring / (scoring + attention),
                               "share_by_difference": 1 - attention / found[name]}  # fmt: skip
        with self.case("scored", "scores alone", shape):
            folded = n // 16
            flops = 2.0 * DIM * 16 * folded * (folded + 1) / 2 * self.heads
            wide = (scores_portable.Tile(128, 256, 64, 8, 3), scores_portable.Tile(128, 128, 64, 8, 3))
            for tile in (None,) if self.rehearse else wide:
                self.time("scored", shape, f"antidiagonal scores alone, {tile or 'default'}",
                          lambda tile=tile: scores_portable.folded(q, k, 16, 1, 128, 128, 0, True, SCALE, tile),
                          flops=flops)  # fmt: skip
        with self.case("scored", "choice alone", shape):
            scores = torch.rand(self.heads, blocks, blocks, device=self.on)
            self.time("scored", shape, "lists from scores", lambda: scored_lists(scores, n, n, keep=keep))
        with self.case("scored", "dense list", shape):
            whole = block_lists(Dense(), n, n, device=self.on)
            found["ours over all blocks"] = self.time(
                "scored", shape, "ours over all blocks", lambda: block_sparse_prefill(q, k, v, whole, scale=SCALE)[0],
                plain=True, flops=4.0 * DIM * n * (n + 1) / 2 * self.heads,
            )  # fmt: skip
        with self.case("scored", "dense cudnn", shape):
            backend = BACKENDS["dense cudnn"]
            found["dense cudnn"] = self.time("scored", shape, "dense cudnn", dense(backend, q, k, v), plain=True)
            for name, part in parts.items():
                if not self.failed_in("scored"):
                    part["times_cudnn"] = found["dense cudnn"] / part["all_ms"]
                self.write({"section": "scored", "shape": shape, "what": f"{name}: parts", **part})
                print("  ", *(f"{label} {value:.3f}" for label, value in part.items()))
        self.ratios("scored", shape, found)

    # Gradients

    def section_backward(self) -> None:
        layouts: dict[str, tuple[backward.Layout, backward.Layout] | None] = {"default": None}
        if self.rehearse:
            layouts = {"16x16": (backward.Layout(16, 16, 4, 2),) * 2}
        good = []
        for name, layout in layouts.items():
            with self.case("backward", f"check {name}"):
                good += [name] * self.check_backward(name, layout)
        n = 64 if self.rehearse else 32768
        shape = f"B1 S{n}"
        q, k, v = self.draw(n)
        size = 32 if self.rehearse else 128
        lists = block_lists(self.power, n, n, block_q=size, block_k=size, device=self.on)
        flops = 10.0 * DIM * size * size * lists.touched * self.heads
        grad = torch.randn_like(q)
        found: dict[str, float] = {}
        out, lse = block_sparse_prefill(q, k, v, lists, scale=SCALE)
        nothing = torch.zeros_like(lse)
        parts = (lists.counts, lists.partials, lists.indices, None, None, None, None, None)
        numbers = (lists.block_q, lists.block_k, lists.q_offset, lists.causal, SCALE)
        mine = None
        for name in good:
            with self.case("backward", name, shape):
                call = lambda name=name: backward.launch(  # noqa: E731
                    grad, nothing, q, k, v, out, lse, *parts, *numbers, layouts=layouts[name]
                )
                mine = call()
                found[f"ours {name}"] = self.time("backward", shape, f"ours {name}", call, flops=flops)
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        with self.case("backward", "flex power", shape):
            peer = compiled_flex()(*leaves, block_mask=flex_mask(lists, power_rule(self.power)), enable_gqa=True)
            call = lambda: torch.autograd.grad(peer, leaves, grad, retain_graph=True)  # noqa: E731
            if mine is not None:
                for name, a, b in zip("qkv", mine, call(), strict=True):
                    self.check("backward", f"flex {name} {n}", b, a, GRADIENT)
            found["flex power"] = self.time("backward", shape, "flex power", call, flops=flops, plain=True)
        for name, backend in BACKENDS.items():
            with self.case("backward", name, shape):
                full = dense(backend, *leaves)()
                call = lambda full=full: torch.autograd.grad(full, leaves, grad, retain_graph=True)  # noqa: E731
                found[name] = self.time("backward", shape, name, call, plain=True)
        self.ratios("backward", shape, found)
        torch._dynamo.reset()

    def check_backward(self, name: str, layout: tuple[backward.Layout, backward.Layout] | None) -> bool:
        small = cases.Case(1, 4, 2, 70, 70, 128, block_q=32, block_k=32)
        chosen = [small] if self.rehearse else [
            cases.Case(2, 8, 2, 1000, 1000, 128), cases.Case(2, 8, 2, 700, 700, 128, table=True),
            cases.Case(1, 4, 1, 200, 1111, 128, per_head=True),
        ]  # fmt: skip
        right = True
        for number, case in enumerate(chosen):
            q, k, v, lists, _, _ = cases.make(case, torch.bfloat16, self.on, number + 1)
            wide = [t.double() for t in (q, k, v)]
            out, lse = reference(*wide, lists, SCALE)
            parts = (lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, None, None, None)
            numbers = (lists.block_q, lists.block_k, lists.q_offset, lists.causal, SCALE)
            grad, less = torch.randn_like(q), torch.randn_like(lse)
            expected = backward_reference(grad.double(), less, *wide, out, lse, *parts, *numbers)
            poisoned(True)
            got = backward.launch(grad, less, q, k, v, out.to(q.dtype), lse, *parts, *numbers, layouts=layout,
                                  chunk=2)  # fmt: skip
            poisoned(False)
            for letter, a, b in zip("qkv", got, expected, strict=True):
                right &= self.check("backward", f"{name} {case.name} d{letter}", a, b, GRADIENT)
        return right

    # A grid

    def section_grid(self) -> None:
        shapes = [((16, 16), (5, 5))] if self.rehearse else [((128, 128), (32, 32)), ((16, 32, 32), (8, 16, 16))]
        for sizes, window in shapes:
            self.grid(sizes, window)
            torch._dynamo.reset()

    def grid(self, sizes: tuple[int, ...], window: tuple[int, ...]) -> None:
        n = prod(sizes)
        shape = f"{'x'.join(map(str, sizes))} w{'x'.join(map(str, window))}"
        q, k, v = self.draw(n)
        found: dict[str, float] = {}
        pattern = Neighborhood(sizes, window)
        lists = block_lists(pattern, n, n, device=self.on)
        order = pattern.order(n).to(self.on, torch.int32)
        slots = order.argsort().to(torch.int32)
        useful = 4.0 * DIM * n * prod(window) * self.heads
        touched = lists.touched * lists.block_q * lists.block_k / (n * prod(window))
        keys = torch.arange(n, device=self.on)

        def ours(run: Callable[..., Tensor]) -> Tensor:
            mine = (permute_tokens(t, order, slots) for t in (q, k, v))
            return permute_tokens(run(*mine), slots, order)

        runs: dict[str, Callable[..., Tensor]] = {
            "ours": lambda q, k, v: block_sparse_prefill(q, k, v, lists, scale=SCALE)[0]
        }
        if not self.rehearse:
            runs["portable 128x128 w8 s2"] = lambda q, k, v: portable.launch(
                q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, None, None,
                lists.block_q, lists.block_k, 0, False, SCALE, portable.Tile(128, 8, 2),
            )[0]  # fmt: skip
        out = None
        for name, run in runs.items():
            with self.case("grid", name, shape):
                out = ours(run) if out is None else out
                rule = lambda rows: pattern.allows(rows[:, None], keys[None, :])[None]  # noqa: E731
                if self.check_rows("grid", f"{name} {shape}", ours(run), q, k, v, rule):
                    found[name] = self.time(
                        "grid", shape, f"{name}, reordering included", lambda run=run: ours(run), flops=useful,
                        touched_over_useful=touched,
                    )  # fmt: skip
        tiled = [permute_tokens(t, order, slots) for t in (q, k, v)]
        with self.case("grid", "parts", shape):
            self.time("grid", shape, "ours without reordering", lambda: runs["ours"](*tiled), flops=useful * touched)
            self.time("grid", shape, "reordering queries", lambda: permute_tokens(q, order, slots), size=2.0 * q.nbytes)
        with self.case("grid", "flex", shape):
            flex, mask = compiled_flex(), flex_mask(lists, tile_rule(sizes, window, pattern.tile or ()))
            inner = lambda q, k, v: flex(q, k, v, block_mask=mask, enable_gqa=True)  # noqa: E731
            if out is not None:
                self.check("grid", f"flex {shape}", ours(inner), out, 1e-2)
            found["flex"] = self.time("grid", shape, "flex, reordering included", lambda: ours(inner), flops=useful)
            self.time("grid", shape, "flex without reordering", lambda: inner(*tiled), flops=useful * touched)
        with self.case("grid", "natten", shape):
            import natten

            layout = [t.repeat_interleave(self.heads // t.shape[1], 1).transpose(1, 2).unflatten(1, sizes)
                      .contiguous() for t in (q, k, v)]  # fmt: skip
            call = lambda: getattr(natten, f"na{len(sizes)}d")(*layout, kernel_size=window)  # noqa: E731
            if out is not None:
                self.check("grid", "natten", call().flatten(1, len(sizes)).transpose(1, 2), out, 1e-2)
            found["natten"] = self.time("grid", shape, "natten, heads expanded before", call, flops=useful)
        for name, backend in BACKENDS.items():
            with self.case("grid", name, shape):
                found[name] = self.time("grid", shape, name, dense(backend, q, k, v, causal=False))
        self.ratios("grid", shape, found)

    def warm_up(self) -> None:
        """Compiles what every section needs, side by side."""
        self.marks.unlink(missing_ok=True)
        common = [sys.executable, __file__, "--out", str(self.options.out), "--warm", "--seconds", "90", "--only"]
        running = [subprocess.Popen([*common, name], stdout=subprocess.DEVNULL) for name in self.options.only]
        late = []
        for name, process in zip(self.options.only, running, strict=True):
            try:
                process.wait(timeout=max(1.0, self.options.compile_seconds - self.seconds()))
            except subprocess.TimeoutExpired:
                process.kill()
                late.append(name)
        if "power" in self.options.only:
            every = list(self.variants())
            self.tried = set(self.marks.read_text().splitlines()) if self.marks.exists() else set()
            for name in sorted(set(every) - set(self.variants())):
                self.write({"section": "power", "what": name, "error": "its check did not finish in its own process"})
        self.marks.unlink(missing_ok=True)
        self.write({"section": "about", "what": "warm", "seconds": round(self.seconds()), "not_finished": late})

    def run(self) -> int:
        if not (self.rehearse or self.options.warm or self.options.no_warm):
            self.warm_up()
        if not self.options.warm:
            with self.case("about", "ceilings"):
                self.ceilings()
        for name in self.options.only:
            with self.case(name, "section"):
                getattr(self, f"section_{name}")()
            if self.on == "cuda":
                torch.cuda.empty_cache()
        self.write({"section": "about", "what": "done", "failed_checks": self.failed, "seconds": round(self.seconds())})
        print(*(f"  FAILED {line}" for line in self.failed), sep="\n")
        for row in self.rows:
            if "ratios" in row:
                print(f"\n{row['section']} {row['shape']}: times as fast as")
                for name, peers in row["ratios"].items():
                    print(f"  {name:44s}", *(f"{peer} {times:.2f}" for peer, times in peers.items()), sep="  ")
        return 1 if self.failed else 0


def poisoned(on: bool) -> None:
    """Whether memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(on, warn_only=True)


def main() -> int:
    """Checks, times, prints ratios; 1 if a check failed."""
    sections = ("power", "decode", "scored", "backward", "grid")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--only", nargs="+", choices=sections, default=list(sections))
    parser.add_argument("--seconds", type=float, default=285, help="nothing new is begun after so many")
    parser.add_argument("--compile-seconds", type=float, default=110, help="what compiling first may take")
    parser.add_argument("--commit", default="", help="what the rows call the code; asked of git if not given")
    parser.add_argument("--no-warm", action="store_true", help="compile as it goes")
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help="small, without a GPU, times mean nothing")
    options = parser.parse_args()
    if options.rehearse:
        options.seconds = 1e9
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; `--rehearse` runs without one, under TRITON_INTERPRET=1")
    warnings.filterwarnings("ignore")
    return Suite(options).run()


if __name__ == "__main__":
    sys.exit(main())
