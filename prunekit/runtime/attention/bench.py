"""Checks and times of sparse attention on the device at hand.

Every pattern is compared with attention under its dense mask in float64 before anything is timed. Times of a pattern
stand beside the fastest dense attention of torch for the same prompt or step; that ratio is given only if all checks
passed.

Shapes: B batch, H query heads, G key-value heads, S tokens, D head size.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.runtime.attention.decode import step
from prunekit.runtime.attention.interface import prompt
from prunekit.runtime.attention.patterns._engine import Pattern, block_lists, dense_mask
from prunekit.runtime.attention.patterns._scored import Scored, is_scored
from prunekit.runtime.attention.patterns.antidiagonal import Antidiagonal
from prunekit.runtime.attention.patterns.block_topk import BlockTopk
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.dilated import Dilated
from prunekit.runtime.attention.patterns.halo import Halo
from prunekit.runtime.attention.patterns.neighborhood import Neighborhood
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.quest import Quest
from prunekit.runtime.attention.patterns.sink_window import SinkWindow
from prunekit.runtime.attention.patterns.streaming import Streaming
from prunekit.runtime.attention.patterns.vertical_slash import VerticalSlash
from prunekit.runtime.attention.policy import name_of
from prunekit_kernels._device import elapsed_ms
from prunekit_kernels.block_sparse_prefill import block_sparse_prefill, cases, refusal

HEADS, KV_HEADS, DIM = 32, 8, 128
# Gradients sum products of two rounded matrices.
GRADIENT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
CHECKED_LENGTHS = (63, 100, 1000)
DENSE = {"dense, flash": SDPBackend.FLASH_ATTENTION, "dense, cuDNN": SDPBackend.CUDNN_ATTENTION}
PROMPTS: tuple[Pattern | Scored, ...] = (
    Dense(), Power(128, 8), Streaming(128, 1, 8), SinkWindow(4, 1024), BlockTopk(16), Antidiagonal(), VerticalSlash(),
)  # fmt: skip
STEPS: tuple[Pattern | Scored, ...] = (Dense(), Power(128, 8), SinkWindow(4, 2044), Quest(16, 2048), BlockTopk(16))


@dataclass(frozen=True)
class Check:
    """A comparison with float64: relative error of the norm, and how large it may be."""

    what: str
    shape: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error, which may be NaN, is within the limit."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Row:
    """A time. `floor_ms`: least time for its arithmetic or bytes at the measured ceilings of the device."""

    what: str
    shape: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float
    peak_mib: float | None
    baseline: str = ""
    times_baseline: float | None = None


@dataclass
class Bench:
    """What was checked and timed where."""

    facts: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def failed(self) -> list[Check]:
        """Checks that did not pass."""
        return [check for check in self.checks if not check.passed]


def bench(
    device: str, dtype: torch.dtype, lengths: tuple[int, ...], batches: tuple[int, ...],
    progress: Progress = NULL_PROGRESS,
) -> Bench:  # fmt: skip
    """Checks every pattern, then times prompts, steps and gradients.

    Args:
        device: where.
        dtype: of queries, keys and values.
        lengths: tokens of the prompts and caches.
        batches: sequences of the steps.
        progress: shown as checks and shapes.
    """
    heads, kv_heads = (HEADS, KV_HEADS) if device.startswith("cuda") else (4, 2)
    found = Bench(_facts(device, dtype, heads, kv_heads))
    with progress.task("checks", total=len(CHECKED_LENGTHS), unit="lengths") as task:
        for n in CHECKED_LENGTHS:
            found.checks += _checks(n, device, dtype)
            task.advance(1)
    with progress.task("times", total=len(lengths), unit="lengths") as task:
        for n in lengths:
            for what, shape, flops, size, run in _cases(n, batches, device, dtype, heads, kv_heads):
                try:
                    found.rows.append(_timed(what, shape, flops, size, run, found.facts))
                except RuntimeError as error:
                    # A backend of torch that does not take the shape, or a card without the memory.
                    found.left_out.append(f"{what} {shape}: {str(error).strip().splitlines()[0][:100]}")
            task.advance(1)
    if not found.failed:
        found.rows = _compared(found.rows)
    return found


def no_kernels(device: str, dtype: torch.dtype) -> str:
    """Why no kernel runs on a device with a type, or an empty string."""
    like = torch.empty(1, HEADS, 1, DIM, device=device, dtype=dtype)
    return refusal(like, like)


def _draw(n: int, queries: int, batch: int, heads: int, kv_heads: int, dim: int, device: str, dtype: torch.dtype
          ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    random = torch.Generator(device).manual_seed(n)
    shapes = ((batch, queries, heads, dim), (batch, n, kv_heads, dim), (batch, n, kv_heads, dim))
    q, k, v = (torch.randn(shape, generator=random, device=device, dtype=dtype).transpose(1, 2) for shape in shapes)
    return q, k, v


def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Plain attention in float64 under a bool mask [1 or H, Q, T]."""
    group = q.shape[1] // k.shape[1]
    wide = [t.double().repeat_interleave(group, 1) for t in (k, v)]
    scores = (q.double() @ wide[0].transpose(2, 3)) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ wide[1]


def _checks(n: int, device: str, dtype: torch.dtype) -> Iterator[Check]:
    """Prompts, steps and gradients of `n` tokens against float64."""
    limit = cases.RELATIVE[dtype]
    shape = f"B2 S{n}"
    image = (n // 5, 5) if n % 5 == 0 else (n // 9, 9)
    ordered = (Neighborhood(image, 3), Halo(image, 4, 1), Dilated(20, 3))
    for pattern in (*PROMPTS, Power(16, 2), SinkWindow(3, 20), BlockTopk(2), Antidiagonal(0.5, 8), *ordered):
        q, k, v = _draw(n, n, 2, 4, 2, 64, device, dtype)
        out = prompt(pattern, q, k, v, None, None)
        if is_scored(pattern):
            lists = [pattern.prompt_lists(q[b : b + 1], k[b : b + 1], 0.125) for b in range(2)]
            mask = torch.stack([each.dense() for each in lists if each is not None])
        else:
            mask = dense_mask(pattern, n, n, device=device)[None]
        yield Check(str(pattern), shape, cases.relative_error(out, _attended(q, k, v, mask)), limit)
    steps = (Dense(), Power(16, 2), SinkWindow(3, 20), Streaming(16, 1, 2), Dilated(20, 3))
    for pattern in (*steps, Quest(16, 2048), Quest(4, 16), BlockTopk(2)):
        q, k, v = _draw(n, 1, 2, 4, 2, 64, device, dtype)
        out = step(pattern, nn.Module(), q, k, v, None, None)
        mask = _chosen(pattern, q, k) if is_scored(pattern) else dense_mask(pattern, 1, n, n - 1, device=device)[None]
        yield Check(f"step of {pattern}", shape, cases.relative_error(out, _attended(q, k, v, mask)), limit)
    yield from _gradient_checks(n, device, dtype)


def _chosen(pattern: Scored, q: Tensor, k: Tensor) -> Tensor:
    """Bool [B, H, 1, T]: the tokens of the newest page and of those with the highest scores."""
    size, keep = pattern.pages
    scores = pattern.page_scores(q, pattern.summaries(k))
    scores[..., -1] = float("inf")
    best = scores.topk(min(keep, scores.shape[2]), 2).indices
    pages = torch.zeros_like(scores, dtype=torch.bool).scatter(2, best, True)
    tokens = pages.repeat_interleave(size, 2)[..., : k.shape[2]]
    return tokens.repeat_interleave(q.shape[1] // k.shape[1], 1).unsqueeze(2)


def _gradient_checks(n: int, device: str, dtype: torch.dtype) -> Iterator[Check]:
    lists = block_lists(Power(128, 1), n, n, device=device)
    q, k, v = (t.requires_grad_() for t in _draw(n, n, 1, 4, 2, 64, device, dtype))
    grad = torch.randn(q.shape, generator=torch.Generator(device).manual_seed(1), device=device, dtype=dtype)
    got = torch.autograd.grad(block_sparse_prefill(q, k, v, lists)[0], (q, k, v), grad)
    wide_q, wide_k, wide_v = (t.detach().double().requires_grad_() for t in (q, k, v))
    out = _attended(wide_q, wide_k, wide_v, lists.dense())
    expected = torch.autograd.grad(out, (wide_q, wide_k, wide_v), grad.double())
    for name, a, b in zip(("queries", "keys", "values"), got, expected, strict=True):
        yield Check(f"gradient of {name}", f"B1 S{n}", cases.relative_error(a, b), GRADIENT[dtype])


Case = tuple[str, str, float, float, Callable[[], object]]


def _dense(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    return run


def _cases(
    n: int, batches: tuple[int, ...], device: str, dtype: torch.dtype, heads: int, kv_heads: int
) -> Iterator[Case]:
    """Name, shape, arithmetic in FLOP, bytes and call of everything that is timed at `n` tokens."""
    q, k, v = _draw(n, n, 1, heads, kv_heads, DIM, device, dtype)
    pair = 4.0 * DIM * heads
    shape = f"prompt B1 S{n}"
    for pattern in PROMPTS:
        chosen = pattern.prompt_lists(q, k, DIM**-0.5) if is_scored(pattern) else block_lists(pattern, n, n)
        touched = 0 if chosen is None else chosen.touched / chosen.counts.shape[0] * chosen.block_q * chosen.block_k
        yield name_of(pattern), shape, pair * touched, 0.0, functools.partial(prompt, pattern, q, k, v, None, None)
    for name, backend in DENSE.items():
        yield name, shape, pair * n * (n + 1) / 2, 0.0, _dense(backend, q, k, v, True)
    side = round(n**0.5)
    if side * side == n:
        window = max(1, side // 4)
        near = functools.partial(prompt, Neighborhood((side, side), window), q, k, v, None, None)
        yield "neighborhood", f"image B1 S{n}", pair * n * window**2, 0.0, near
        for name, backend in DENSE.items():
            yield name, f"image B1 S{n}", pair * n * n, 0.0, _dense(backend, q, k, v, False)
    yield from _gradient_cases(n, q, k, v)
    for batch in batches:
        yield from _step_cases(_draw(n, 1, batch, heads, kv_heads, DIM, device, dtype))


def _step_cases(drawn: tuple[Tensor, Tensor, Tensor]) -> Iterator[Case]:
    _, k, _ = drawn
    batch, kv_heads, n, dim = k.shape
    shape = f"step B{batch} T{n}"
    token = 2.0 * dim * batch * kv_heads * k.element_size()
    for pattern in STEPS:
        read = pattern.pages[0] * pattern.pages[1] if is_scored(pattern) else _row(pattern, n)
        run = functools.partial(step, pattern, nn.Module(), *drawn, None, None)
        yield name_of(pattern), shape, 0.0, token * min(read, n), run
    for name, backend in DENSE.items():
        yield name, shape, 0.0, token * n, _dense(backend, *drawn, False)


def _row(pattern: Pattern, n: int) -> int:
    return int(dense_mask(pattern, 1, n, n - 1).sum())


def _gradient_cases(n: int, q: Tensor, k: Tensor, v: Tensor) -> Iterator[Case]:
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    shape = f"gradients B1 S{n}"
    lists = block_lists(Power(128, 8), n, n, device=q.device)
    # Two products forward, five backward, of two operations for each pair and channel.
    pair = 14.0 * DIM * q.shape[1]

    def run(forward: Callable[[], Tensor]) -> Callable[[], object]:
        def call() -> object:
            return torch.autograd.grad(forward().sum(), (q, k, v))

        return call

    touched = lists.touched * lists.block_q * lists.block_k
    yield "power", shape, pair * touched, 0.0, run(lambda: block_sparse_prefill(q, k, v, lists)[0])
    for name, backend in DENSE.items():
        yield name, shape, pair * n * (n + 1) / 2, 0.0, run(_dense(backend, q, k, v, True))


def _times(run: Callable[[], object], cuda: bool, seconds: float = 0.3) -> list[float]:
    """Times of calls in ms, after a first one that may compile."""
    run()
    found: list[float] = []
    began = time.perf_counter()
    while len(found) < 3 or (len(found) < 50 and time.perf_counter() - began < seconds):
        found.append(elapsed_ms(run, cuda))
    return found


def _timed(what: str, shape: str, flops: float, size: float, run: Callable[[], object], facts: dict[str, Any]) -> Row:
    cuda = facts["device"].startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = sorted(_times(run, cuda))
    floor = flops / facts["matmul_tflops"] / 1e9 + size / facts["copy_gb_s"] / 1e6
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else None
    return Row(what, shape, statistics.median(found), found[len(found) // 5], found[-1 - len(found) // 5], floor, peak)


def _compared(rows: list[Row]) -> list[Row]:
    """The rows with how many times as fast as the fastest dense attention of their shape they are."""
    best: dict[str, Row] = {}
    for row in rows:
        if row.what in DENSE and (row.shape not in best or row.median_ms < best[row.shape].median_ms):
            best[row.shape] = row
    found = []
    for row in rows:
        dense = None if row.what in DENSE else best.get(row.shape)
        if dense is not None:
            row = replace(row, baseline=dense.what, times_baseline=dense.median_ms / row.median_ms)
        found.append(row)
    return found


def _facts(device: str, dtype: torch.dtype, heads: int, kv_heads: int) -> dict[str, Any]:
    """Device, versions, shape and measured ceilings."""
    cuda = device.startswith("cuda")
    size = 8192 if cuda else 512
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(2**28 if cuda else 2**24, device=device)
    target = torch.empty_like(source)
    product = statistics.median(_times(lambda: a @ b, cuda))
    copy = statistics.median(_times(lambda: target.copy_(source), cuda))
    return {
        "device": device,
        "name": torch.cuda.get_device_name(device) if cuda else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": heads, "kv_heads": kv_heads, "dim": DIM,
        "matmul_tflops": 2 * size**3 / product / 1e9,
        "copy_gb_s": 2 * source.nbytes / copy / 1e6,
        "kernels": no_kernels(device, dtype) or "yes",
    }  # fmt: skip
