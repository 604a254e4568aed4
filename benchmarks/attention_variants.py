# ruff: noqa
"""Variants of the attention kernels beside each other and a peer, on one GPU; checks first.

    python benchmarks/attention_variants.py --out rows.jsonl [--only grid backward decode scored power]

Each section runs in a process of its own, so that a kernel that hangs or loses the device costs no other section. All
sections are first run once side by side to compile their kernels. Variants of a section are timed in turn, twice.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
# The patterns alone, without what needs transformers.
for name in ("prunekit.runtime",):
    package = types.ModuleType(name)
    package.__path__ = [str(ROOT.joinpath(*name.split(".")))]
    sys.modules[name] = package

import torch
from attention_decode import Device, facts
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.neighborhood import Neighborhood
from prunekit.runtime.attention.patterns.power import Power
from prunekit_kernels.block_scores import portable as scores
from prunekit_kernels.block_scores import reference as scores_reference
from prunekit_kernels.block_scores import select_blocks
from prunekit_kernels.block_sparse_prefill import BlockLists, backward, cases, hopper_launch, portable
from prunekit_kernels.block_sparse_prefill.reference import backward_reference, masked_attention, reference
from prunekit_kernels.page_summaries import page_bounds
from prunekit_kernels.page_summaries import portable as summaries
from prunekit_kernels.page_summaries.reference import bounds_reference, means_reference, page_scores_reference
from prunekit_kernels.permute import permute_tokens
from prunekit_kernels.sparse_decode import PageLists
from prunekit_kernels.sparse_decode import portable as decode
from prunekit_kernels.sparse_decode.reference import decode_reference

HEADS, KV_HEADS, DIM, SCALE = 32, 8, 128, 128**-0.5
SECTIONS = ("grid", "backward", "decode", "scored", "power")


class Round:
    """Rows, checks, clock of one section."""

    def __init__(self, section: str, out: Path, warm: bool) -> None:
        self.section, self.out, self.warm = section, out, warm
        self.device = Device(False)
        self.failed = False

    def write(self, **row: Any) -> None:
        if self.warm and "error" not in row:
            return
        row = {"section": self.section, **row}
        with self.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def guard(self, what: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {str(error).strip()[:400]} ({Path(where.filename).name}:{where.lineno})"
            self.write(what=what, error=text, warm=self.warm)
            if "illegal" in text or "misaligned" in text or "unspecified launch failure" in text:
                raise SystemExit(1) from error
        return None

    def check(self, what: str, got: Tensor, expected: Tensor, limit: float) -> bool:
        error = cases.relative_error(got.cpu(), expected.cpu())
        self.write(what=f"check {what}", relative_error=error, limit=limit, passed=error <= limit)
        self.failed |= not error <= limit
        return error <= limit

    def time(self, shape: str, runs: dict[str, Callable[[], Any]], rounds: int = 2, **rates: float) -> None:
        """Times all runs in turn; `flops` and `size` give a rate."""
        good = {}
        for name, run in runs.items():

            def once(run: Callable[[], Any] = run) -> bool:
                run()
                torch.cuda.synchronize()
                return True

            if self.guard(name, once):
                good[name] = run
        if self.warm:
            return
        found: dict[str, list[float]] = {name: [] for name in good}
        for _ in range(rounds):
            for name, run in good.items():
                measured = self.guard(name, lambda run=run: self.device.measure(run))
                if measured:
                    found[name].append(measured[0])
        for name, times in found.items():
            if times:
                best = min(times)
                row = {"what": name, "shape": shape, "us": [round(t, 2) for t in times]}
                if "flops" in rates:
                    row["tflops"] = round(rates["flops"] / best / 1e6, 1)
                if "size" in rates:
                    row["tb_s"] = round(rates["size"] / best / 1e6, 3)
                self.write(**row)


def draw(n: int, batch: int = 1, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    shapes = [(batch, heads, n, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    return q, k, v


def hopper(lists: BlockLists, **how: Any) -> Callable[..., Tensor]:
    return lambda q, k, v: hopper_launch.launch(
        q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, lists.q_offset,
        lists.causal, SCALE, **how,
    )[0]  # fmt: skip


def tiled(lists: BlockLists, tile: portable.Tile) -> Callable[..., Tensor]:
    return lambda q, k, v: portable.launch(
        q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, None, None,
        lists.block_q, lists.block_k, lists.q_offset, lists.causal, SCALE, tile,
    )[0]  # fmt: skip


def flex_mask(lists: BlockLists, n: int, rule: Callable[..., Tensor]) -> BlockMask:
    """Our lists as FlexAttention's: masked blocks and full ones apart."""
    counts, partials, indices = (t[0].long() for t in (lists.counts, lists.partials, lists.indices))
    rows, width = indices.shape
    cols = -(-n // lists.block_k)
    slot = torch.arange(width, device=indices.device)
    part, full = slot < partials[:, None], (slot >= partials[:, None]) & (slot < counts[:, None])

    def packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        dense = torch.zeros(rows, cols, dtype=torch.int64, device=indices.device)
        row, at = chosen.nonzero(as_tuple=True)
        dense[row, indices[row, at]] = 1
        order = torch.argsort(dense, dim=1, descending=True, stable=True)
        return dense.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None]

    return BlockMask.from_kv_blocks(*packed(part), *packed(full), BLOCK_SIZE=lists.block_k, mask_mod=rule)


def compiled() -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False)


def power_rule(pattern: Power) -> Callable[..., Tensor]:
    size, near, sink = pattern.block_tokens, pattern.window_blocks, pattern.sink_blocks

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        d = q // size - k // size
        return ((d < near) | ((d & (d - 1)) == 0) | (k // size < sink)) & (k <= q)

    return rule


def tile_rule(grid: tuple[int, ...], window: tuple[int, ...], tile: tuple[int, ...]) -> Callable[..., Tensor]:
    """A neighbourhood of slots in the order of tiles, coordinates by arithmetic; sizes divide each other."""

    def coordinates(slot: Tensor) -> list[Tensor]:
        number, inner, found = slot // 128, slot % 128, []
        for size, t in zip(reversed(grid), reversed(tile), strict=True):
            found.append(number % (size // t) * t + inner % t)
            number, inner = number // (size // t), inner // t
        return found[::-1]

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = None
        for i, j, size, w in zip(coordinates(q), coordinates(k), grid, window, strict=True):
            right = w // 2 + w % 2 - 1
            first = (i - w // 2).clamp(min=0) - (i + right - (size - 1)).clamp(min=0)
            along = (j >= first) & (j < first + w)
            seen = along if seen is None else seen & along
        return seen

    return rule


def section_grid(r: Round) -> None:
    good = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    for number, case in enumerate((
        cases.Case(2, 4, 2, 1000, 1000, 128, table=True), cases.Case(1, 4, 1, 200, 1111, 128, table=True, per_head=True),
        cases.Case(1, 2, 1, 1000, 1000, 64, table=True, causal=False), cases.Case(1, 2, 2, 4097, 4097, 128, table=True),
        cases.Case(2, 8, 2, 1000, 1000, 128),
    )):  # fmt: skip

        def small(case: cases.Case = case, number: int = number) -> bool:
            right = True
            q, k, v, lists, _, _ = cases.make(case, torch.bfloat16, "cuda", number + 1)
            expected, sums = reference(q.double(), k.double(), v.double(), lists, SCALE)
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            out, lse = hopper_launch.launch(
                q, k, v, lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, lists.q_offset,
                lists.causal, SCALE,
            )  # fmt: skip
            right &= r.check(f"hopper {case.name}", out, expected, 8e-3)
            right &= r.check(f"hopper {case.name} lse", lse, sums, 1e-3)
            out = tiled(lists, portable.Tile(128, 8, 2))(q, k, v)
            return right & r.check(f"portable {case.name}", out, expected, 8e-3)

        good &= bool(r.guard(f"check {case.name}", small))
    torch.use_deterministic_algorithms(False)
    for sizes, window in (((128, 128), (32, 32)), ((16, 32, 32), (8, 16, 16)), ((128, 128), (13, 13))):
        n = 16384
        q, k, v = draw(n)
        pattern = Neighborhood(sizes, window)
        lists = block_lists(pattern, n, n, device="cuda")
        order = pattern.order(n).to("cuda")
        inverse = order.argsort()
        narrow = (order.int(), inverse.int())
        shape = f"{'x'.join(map(str, sizes))} w{window} tile {pattern.tile}"
        share = n
        for w in window:
            share *= w
        touched = 4.0 * DIM * 128 * 128 * lists.touched * HEADS
        r.write(what="lists", shape=shape, touched=lists.touched, partial=int(lists.partials.sum()),
                masks=len(lists.masks), touched_over_useful=lists.touched * 128 * 128 / share,
                touched_floor_us_at_700=touched / 700e6)  # fmt: skip
        a, b, c = (permute_tokens(t, *narrow) for t in (q, k, v))
        r.check("permute", a.float(), q.index_select(2, order).float(), 0.0)
        flex, mask = compiled(), flex_mask(lists, n, tile_rule(sizes, window, pattern.tile))

        def whole(run: Callable[..., Tensor], q: Tensor = q, k: Tensor = k, v: Tensor = v,
                  narrow: tuple[Tensor, Tensor] = narrow) -> Tensor:  # fmt: skip
            return permute_tokens(run(*(permute_tokens(t, *narrow) for t in (q, k, v))), *narrow[::-1])

        def flexed(q: Tensor, k: Tensor, v: Tensor, flex: Any = flex, mask: Any = mask) -> Tensor:
            return flex(q, k, v, block_mask=mask, enable_gqa=True)

        run = hopper(lists)
        out = r.guard("hopper whole", lambda run=run: whole(run))
        if out is not None:
            keys = torch.arange(n, device="cuda")
            for first in (0, n // 2 + 5, n - 32):
                rows = torch.arange(first, first + 32, device="cuda")
                seen = pattern.allows(rows[:, None], keys[None, :])[None]
                expected, _ = masked_attention(q[0, :, rows].float(), k[0].float(), v[0].float(), seen, SCALE)
                good &= r.check(f"hopper {shape} rows {first}", out[0, :, rows], expected, 8e-3)
            peer = r.guard("flex", lambda: flexed(a, b, c))
            if peer is not None:
                r.check("flex", permute_tokens(peer, *narrow[::-1]), out, 1e-2)
        runs = {
            "hopper, permuting included": lambda run=run: whole(run),
            "flex, tiles, permuting included": lambda f=flexed: whole(f),
            "hopper alone": lambda run=run: run(a, b, c),
            "hopper alone, rows first": lambda h=hopper(lists, rows_first=True): h(a, b, c),
            "hopper alone, heads first": lambda h=hopper(lists, rows_first=False): h(a, b, c),
            "flex, tiles, alone": lambda f=flexed: f(a, b, c),
            "portable 128 w8 s2 alone": lambda t=tiled(lists, portable.Tile(128, 8, 2)): t(a, b, c),
            "portable 64 w8 s3 alone": lambda t=tiled(lists, portable.Tile(64, 8, 3)): t(a, b, c),
            "portable 64 w4 s3 alone": lambda t=tiled(lists, portable.Tile(64, 4, 3)): t(a, b, c),
        }
        r.time(shape, runs, flops=touched)
        if window == (32, 32):
            r.time(shape, {
                "permute q": lambda: permute_tokens(q, *narrow),
                "index_select q": lambda: q.index_select(2, order),
                "index_copy out": lambda: torch.empty_like(q).index_copy_(2, order, q),
            }, size=2.0 * q.nbytes)  # fmt: skip


def section_backward(r: Round) -> None:
    L = backward.Layout
    for_queries = {f"{q}x{k} w{w} s{s}": L(q, k, w, s) for q, k, w, s in (
        (64, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 4, 3))}  # fmt: skip
    for_keys = {f"{q}x{k} w{w} s{s}": L(q, k, w, s) for q, k, w, s in (
        (64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 8, 2), (64, 128, 8, 3), (32, 128, 8, 3), (32, 64, 4, 3), (128, 64, 8, 2))}  # fmt: skip
    for number, case in enumerate((
        cases.Case(2, 8, 2, 1000, 1000, 128), cases.Case(2, 8, 2, 700, 700, 128, table=True),
        cases.Case(1, 4, 1, 200, 1111, 128, per_head=True), cases.Case(2, 4, 2, 1000, 1000, 128, spans=True),
    )):  # fmt: skip

        def small(case: cases.Case = case, number: int = number) -> None:
            q, k, v, lists, starts, ends = cases.make(case, torch.bfloat16, "cuda", number + 1)
            wide = [t.double() for t in (q, k, v)]
            out, lse = reference(*wide, lists, SCALE, starts, ends)
            parts = (lists.counts, lists.partials, lists.indices, lists.mask_ids, lists.masks, starts, ends, None)
            numbers = (lists.block_q, lists.block_k, lists.q_offset, lists.causal, SCALE)
            grad, less = torch.randn_like(q), torch.randn_like(lse) * (lse > float("-inf"))
            expected = backward_reference(grad.double(), less, *wide, out, lse, *parts, *numbers)
            pairs = list(itertools.zip_longest(for_queries.values(), for_keys.values(), fillvalue=L(64, 64, 4, 2)))
            for one, two in pairs if number == 0 else pairs[:1]:
                torch.use_deterministic_algorithms(True, warn_only=True)
                got = backward.launch(grad, less, q, k, v, out.to(q.dtype), lse, *parts, *numbers, layouts=(one, two),
                                      chunk=2)  # fmt: skip
                torch.use_deterministic_algorithms(False)
                for letter, a, b in zip("qkv", got, expected, strict=True):
                    r.check(f"{one} {two} {case.name} d{letter}", a, b, 2e-2)

        r.guard(f"check {case.name}", small)
    for n in (32768, 8192):
        q, k, v = draw(n)
        pattern = Power(block_tokens=128, window_blocks=8, sink_blocks=1)
        lists = block_lists(pattern, n, n, device="cuda")
        flops = 10.0 * DIM * 128 * 128 * lists.touched * HEADS
        grad = torch.randn_like(q)
        out, lse = hopper_launch.launch(q, k, v, lists.counts, lists.partials, lists.indices, None, None,
                                        lists.q_offset, True, SCALE)  # fmt: skip
        nothing = torch.zeros_like(lse)
        parts = (lists.counts, lists.partials, lists.indices, None, None, None, None, None)
        numbers = (lists.block_q, lists.block_k, lists.q_offset, lists.causal, SCALE)

        def call(one: Any, two: Any, chunk: int | None = None, data: Any = (grad, nothing, q, k, v, out, lse, *parts,
                 *numbers)) -> Any:  # fmt: skip
            return backward.launch(*data, layouts=(one, two), chunk=chunk)

        base = (L(64, 64, 4, 2), L(64, 64, 4, 2))
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        peer = compiled()(*leaves, block_mask=flex_mask(lists, n, power_rule(pattern)), enable_gqa=True)
        flex = lambda: torch.autograd.grad(peer, leaves, grad, retain_graph=True)  # noqa: E731
        for letter, a, b in zip("qkv", r.guard("flex", flex) or (), call(*base), strict=False):
            r.check(f"flex d{letter}", a, b, 2e-2)
        runs: dict[str, Callable[[], Any]] = {"flex": flex, "both 64x64 w4 s2": lambda: call(*base)}
        for chunk in (16, 64, 1024):
            runs[f"both 64x64 w4 s2, chunk {chunk}"] = lambda c=chunk: call(*base, c)
        r.time(f"S{n}", runs, flops=flops)
        real = backward._queries, backward._keys

        class Nothing:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *a, **k: None

        def only(which: int, layout: Any) -> Callable[[], Any]:
            def run() -> Any:
                backward._queries, backward._keys = (real[i] if i == which else Nothing() for i in range(2))
                try:
                    return call(*((layout, base[1]) if which == 0 else (base[0], layout)))
                finally:
                    backward._queries, backward._keys = real

            return run

        if n == 32768:
            r.time(f"S{n}", {f"queries {name}": only(0, layout) for name, layout in for_queries.items()}
                   | {f"keys {name}": only(1, layout) for name, layout in for_keys.items()}
                   | {"neither": only(2, base[0])}, flops=flops)  # fmt: skip


def section_decode(r: Round) -> None:
    T = decode.Tile
    tiles = {
        "default": T(64), "early": T(64, early=True), "fused": T(64, fused=True),
        "32 keys w2, 4 an SM": T(32, warps=2, programs=4), "fused, 32 keys w2, 4 an SM": T(32, warps=2, programs=4, fused=True),
        "fused, 32 keys w4, 4 an SM": T(32, programs=4, fused=True), "fused, 3 an SM": T(64, stages=3, programs=3, fused=True),
        "fused, 1 an SM, s5": T(64, stages=5, programs=1, fused=True),
    }  # fmt: skip
    torch.manual_seed(3)
    q, k, v = (
        torch.randn(3, h, n, DIM, device="cuda", dtype=torch.bfloat16) for h, n in ((8, 1), (2, 1111), (2, 1111))
    )
    table = torch.stack([torch.randperm(69, device="cuda")[:40] for _ in range(6)]).view(3, 2, 40)
    lists = PageLists.from_table(table, torch.randint(300, 640, (3, 2), device="cuda"), 2, 16, paged=False)
    expected, sums = decode_reference(q.double(), k.double(), v.double(), lists.indices, lists.starts, lists.tokens,
                                      16, False, SCALE)  # fmt: skip
    for name, tile in tiles.items():

        def small(name: str = name, tile: Any = tile) -> None:
            for again in range(3):
                torch.use_deterministic_algorithms(True, warn_only=True)
                out, lse = decode.launch(q, k, v, lists.indices, lists.starts, lists.tokens, 16, False, lists.longest,
                                         lists.total, SCALE, tile)  # fmt: skip
                torch.use_deterministic_algorithms(False)
                r.check(f"{name} {again}", out, expected, 8e-3)
                r.check(f"{name} {again} lse", lse, sums, 1e-3)

        r.guard(f"check {name}", small)
    low, high = page_bounds(k, 16)
    for name, a, b in zip(("low", "high"), (low, high), bounds_reference(k, 16), strict=True):
        r.check(f"page bounds {name}", a.float(), b.float(), 0.0)
    r.check("block means", summaries.launch(k, 128, True)[0], means_reference(k.double(), 128), 8e-3)
    r.check("page scores", summaries.bounds_scores(q, low, high),
            page_scores_reference(q.double(), low.double(), high.double()), 1e-4)  # fmt: skip
    given = torch.randn(40, 1, 8190)
    given[::3] = (given[::3] * 8).round() / 8
    for keep in (1, 50, 128, 5000):
        mine = select_blocks(given.cuda(), 1, 131033, block_q=1, block_k=16, q_offset=131032, keep=keep, ascending=True)
        other = scores_reference.select_reference(given, 1, 16, 1, 131033, 131032, True, keep, 0.0, 1, 1,
                                                  mine[2].shape[-1], True)  # fmt: skip
        for name, a, b in zip(("counts", "partials", "indices"), mine, other, strict=True):
            r.check(f"select {keep} {name}", a.float(), b.float(), 0.0)
    for batch, context in ((8, 131072), (1, 131072), (8, 32768)):
        shape = f"B{batch} T{context}"
        torch.manual_seed(1)
        q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, KV_HEADS, context, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        pages = torch.stack([torch.randperm(context // 16, device="cuda")[:128].sort().values
                             for _ in range(batch * KV_HEADS)]).view(batch, KV_HEADS, 128)  # fmt: skip
        lists = PageLists.from_table(
            pages, torch.full((batch, KV_HEADS), 2048, device="cuda"), KV_HEADS, 16, paged=False
        )
        row = 4.0 * DIM * batch * KV_HEADS
        word = torch.zeros(1, device="cuda")
        runs: dict[str, Callable[[], Any]] = {"a fill of one word": lambda: word.zero_()}
        for name, tile in tiles.items():
            runs[name] = lambda tile=tile: decode.launch(
                q, k, v, lists.indices, lists.starts, lists.tokens, 16, False, lists.longest, lists.total, SCALE, tile
            )
        near = [t[:, :, :2048].contiguous() for t in (k, v)]
        whole = PageLists.whole(torch.full((batch, KV_HEADS), 2048, device="cuda"), 2048)
        runs["2048 tokens of a cache of 2048"] = lambda: decode.launch(
            q, *near, whole.indices, whole.starts, whole.tokens, 64, False, whole.longest, whole.total, SCALE
        )

        def cudnn() -> Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return scaled_dot_product_attention(q, *near, enable_gqa=True)

        runs["cudnn, a cache of 2048"] = cudnn
        r.time(shape, runs, size=row * 2048)
        low, high = page_bounds(k, 16)
        r.time(shape, {
            "page bounds, 8 pages w4": lambda: summaries.launch(k, 16, False, 8, 4),
            "page bounds, 16 pages w4": lambda: summaries.launch(k, 16, False, 16, 4),
            "page bounds, 4 pages w2": lambda: summaries.launch(k, 16, False, 4, 2),
            "page bounds, 8 pages w2": lambda: summaries.launch(k, 16, False, 8, 2),
        }, size=row * context / 2 * 1.125)  # fmt: skip
        runs = {"page scores by torch": lambda: page_scores_reference(q, low, high)}
        for n, w in ((64, 4), (128, 4), (128, 8), (32, 4), (64, 2)):
            runs[f"page scores, {n} pages w{w}"] = lambda n=n, w=w: summaries.bounds_scores(q, low, high, n, w)
        r.time(shape, runs, size=row * context / 16)
        found = summaries.bounds_scores(q, low, high).flatten(0, 1).unsqueeze(1)
        runs = {}
        for w in (4, 8, 16, 32):
            runs[f"select w{w}"] = lambda w=w: scores.select(
                found, 1, 16, 1, context, context - 1, True, 128, 0.0, 0, 1, 128, True, w
            )
        runs["torch.topk"] = lambda: found.topk(128, -1, sorted=False)
        r.time(shape, runs)
        count = torch.full((batch, KV_HEADS), 2048, dtype=torch.int32, device="cuda")

        def step() -> Any:
            marks = summaries.bounds_scores(q, low, high).flatten(0, 1).unsqueeze(1)
            table = select_blocks(marks, 1, context, block_q=1, block_k=16, q_offset=context - 1, keep=128, sink=0,
                                  ascending=True)[2]  # fmt: skip
            mine = PageLists.from_table(table[:, 0].unflatten(0, (batch, KV_HEADS)), count, KV_HEADS, 16, paged=False)
            return decode.launch(q, k, v, mine.indices, mine.starts, mine.tokens, 16, False, 2048, mine.total, SCALE)

        r.time(shape, {"step, choosing included": step}, size=row * (2048 + context / 16))
        del k, v, low, high
        torch.cuda.empty_cache()


def section_scored(r: Round) -> None:
    S = scores.Tile
    tiles = {
        "128x128 d128 w8 s3": S(128, 128, 128, 8, 3), "128x256 d64 w8 s3": S(128, 256, 64, 8, 3),
        "128x256 d64 w8 s4": S(128, 256, 64, 8, 4), "256x128 d64 w8 s3": S(256, 128, 64, 8, 3),
        "256x128 d64 w8 s4": S(256, 128, 64, 8, 4), "128x256 d128 w8 s2": S(128, 256, 128, 8, 2),
        "128x128 d64 w4 s4": S(128, 128, 64, 4, 4),
    }  # fmt: skip
    torch.manual_seed(5)
    for n, m in ((1111, 1111), (4096, 4096), (300, 2000)):
        q, k = (torch.randn(1, h, t, DIM, device="cuda", dtype=torch.bfloat16) for h, t in ((4, n), (2, m)))
        expected = scores_reference.folded_scores(q.double(), k.double(), 16, 128, 128, m - n, True, SCALE)
        for name, tile in tiles.items() if n == 1111 else [*tiles.items()][1:2]:
            torch.use_deterministic_algorithms(True, warn_only=True)
            got = r.guard(name, lambda tile=tile: scores.folded(q, k, 16, 128, 128, m - n, True, SCALE, tile))
            torch.use_deterministic_algorithms(False)
            if got is not None:
                r.check(f"{name} {n} {m}", got, expected, 2e-3)
    for n, stride in ((131072, 16), (131072, 32), (32768, 16)):
        q, k, _ = draw(n)
        folded = n // stride
        flops = 2.0 * DIM * stride * folded * (folded + 1) / 2 * HEADS
        runs: dict[str, Callable[[], Any]] = {}
        for name, tile in tiles.items():
            runs[name] = lambda tile=tile: scores.folded(q, k, stride, 128, 128, 0, True, SCALE, tile)
        real = scores._folded

        class Nothing:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return lambda *a, **k: None

        def summing() -> Any:
            scores._folded = Nothing()
            try:
                return scores.folded(q, k, stride, 128, 128, 0, True, SCALE)
            finally:
                scores._folded = real

        runs["summing alone"] = summing
        r.time(f"S{n} stride {stride}", runs, flops=flops)
        blocks = n // 128
        given = torch.rand(HEADS, blocks, blocks, device="cuda")
        keep = max(1, round(blocks * (1 - 0.9**0.5)))
        runs = {f"lists from scores w{w}": lambda w=w: scores.select(
            given, 128, 128, n, n, 0, True, keep, 0.0, 1, 1, max(keep, 4), False, w) for w in (1, 2, 4, 8)}  # fmt: skip
        r.time(f"S{n} stride {stride}", runs)
        if n == 131072:
            wide = DIM * stride
            a, b = q[0, :8].view(8, folded, wide), k[0].view(8, folded, wide)
            r.time(f"S{n} stride {stride}", {"a quarter of the whole product, cublas": lambda: torch.bmm(a, b.mT)},
                   flops=2.0 * wide * folded * folded * 8)  # fmt: skip
        del q, k, given
        torch.cuda.empty_cache()


def section_power(r: Round) -> None:
    for n, batch in ((8192, 1), (8192, 2), (8192, 4), (4096, 8), (16384, 1), (32768, 1), (131072, 1)):
        q, k, v = draw(n, batch)
        pattern = Power(block_tokens=128, window_blocks=8, sink_blocks=1)
        lists = block_lists(pattern, n, n, device="cuda")
        flops = 4.0 * DIM * 128 * 128 * lists.touched * HEADS * batch
        runs = {name: (lambda h=hopper(lists, rows_first=first): h(q, k, v))
                for name, first in (("heads first", False), ("rows first", True))}  # fmt: skip
        if batch == 1 and n in (8192, 32768):
            flex, mask = compiled(), flex_mask(lists, n, power_rule(pattern))
            runs["flex"] = lambda flex=flex, mask=mask: flex(q, k, v, block_mask=mask, enable_gqa=True)
            whole = block_lists(Dense(), n, n, device="cuda")
            del whole
        r.time(f"B{batch} S{n}", runs, rounds=3, flops=flops)
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    r.time("8192 cubed", {"product": lambda: a @ b}, flops=2.0 * size**3)
    source = torch.ones(2**29, device="cuda")
    target = torch.empty_like(source)
    r.time("2 GiB", {"copy": lambda: target.copy_(source), "read": lambda: source.sum()}, size=2.0 * source.nbytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--part", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.part:
        part = Round(options.part, options.out, options.warm)
        globals()[f"section_{options.part}"](part)
        return 1 if part.failed else 0
    began = time.monotonic()
    options.out.write_text(json.dumps({"section": "about", **facts("")}) + "\n")
    common = [sys.executable, __file__, "--out", str(options.out), "--part"]
    logs = [open(options.out.with_suffix(f".{name}.log"), "w") for name in options.only]  # noqa: SIM115
    running = [subprocess.Popen([*common, name, "--warm"], stdout=log, stderr=log)
               for name, log in zip(options.only, logs, strict=True)]  # fmt: skip
    for name, process in zip(options.only, running, strict=True):
        try:
            print(name, "warm", process.wait(timeout=max(1.0, 90 - (time.monotonic() - began))), flush=True)
        except subprocess.TimeoutExpired:
            process.kill()
            print(name, "not warm in time", flush=True)
    print(f"warm after {time.monotonic() - began:.0f} s", flush=True)
    worst = 0
    for name in options.only:
        left = 260 - (time.monotonic() - began)
        try:
            done = subprocess.run([*common, name], timeout=max(5.0, min(75.0, left)), stderr=subprocess.PIPE, text=True)
            worst = max(worst, done.returncode)
            print(f"{name}: {done.returncode} at {time.monotonic() - began:.0f} s", done.stderr[-1500:], flush=True)
        except subprocess.TimeoutExpired:
            print(f"{name}: no end in time", flush=True)
    return worst


if __name__ == "__main__":
    sys.exit(main())
