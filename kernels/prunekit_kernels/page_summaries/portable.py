"""Page summaries in Triton, for any GPU it compiles for and for its interpreter.

Shapes: B batch, G heads, T tokens, D head size, P pages.
"""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunekit_kernels._triton import dot, precision
from prunekit_kernels.page_summaries.kept import KeptPages

# A step makes one page: of 8,192 pages, programs that find nothing to do should be few.
SPAN = 8


@triton.jit
def _reduced(
    x_at, page, n_tokens, stride_t,
    PAGE: tl.constexpr, PAGES: tl.constexpr, UNROLL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    """Means twice, or smallest and largest values, of PAGES pages.

    Each thread holds a few channels of a page and meets its tokens one after the other, UNROLL loads at a time.
    """
    at_d = tl.arange(0, BLOCK_D)
    # In float32, which holds every half value, because the interpreter compares bfloat16 by its bits.
    low = tl.full([PAGES, BLOCK_D], 0.0 if MEAN else float("inf"), tl.float32)
    high = tl.full([PAGES, BLOCK_D], float("-inf"), tl.float32)
    for first in range(0, PAGE, UNROLL):
        for t in tl.static_range(UNROLL):
            token = page * PAGE + first + t
            load = (token < n_tokens)[:, None] & (at_d < DIM)[None, :]
            x = tl.load(x_at + token.to(tl.int64)[:, None] * stride_t, mask=load, other=0.0).to(tl.float32)
            if MEAN:
                low += x
            else:
                low = tl.minimum(low, tl.where(load, x, float("inf")))
                high = tl.maximum(high, tl.where(load, x, float("-inf")))
    if MEAN:
        low = low / tl.minimum(n_tokens - page * PAGE, PAGE).to(tl.float32)[:, None]
        high = low
    return low, high


@triton.jit(do_not_specialize=["heads", "n_tokens", "n_pages"])
def _summaries(
    x_ptr, first_ptr, second_ptr, stride_b, stride_g, stride_t, heads, n_tokens, n_pages,
    PAGE: tl.constexpr, PAGES: tl.constexpr, UNROLL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr,
):  # fmt: skip
    """Summaries of PAGES pages of one head."""
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    at_d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_g + at_d[None, :]
    low, high = _reduced(x_at, page, n_tokens, stride_t, PAGE, PAGES, UNROLL, DIM, BLOCK_D, MEAN)
    out = (tl.program_id(1).to(tl.int64) * n_pages + page)[:, None] * DIM + at_d[None, :]
    store = (page < n_pages)[:, None] & (at_d < DIM)[None, :]
    tl.store(first_ptr + out, low.to(first_ptr.dtype.element_ty), mask=store)
    if not MEAN:
        tl.store(second_ptr + out, high.to(second_ptr.dtype.element_ty), mask=store)


@triton.jit(do_not_specialize=["heads"])
def _compared(
    x_ptr, filled_ptr, newest_ptr, covered_ptr, first_ptr, stride_b, stride_g, stride_t, heads,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first page to be made again as far as one head tells: none that was full if its newest keys are as they were.

    Then remembers the newest keys of now, and how many there are.
    """
    line = tl.program_id(0)
    n = tl.load(filled_ptr + line // heads)
    covered = tl.load(covered_ptr + line)
    at_t = tl.arange(0, PAGE)
    at_d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + (line // heads).to(tl.int64) * stride_b + (line % heads).to(tl.int64) * stride_g + at_d[None, :]
    newest_at = newest_ptr + (line.to(tl.int64) * PAGE + at_t)[:, None] * DIM + at_d[None, :]
    slot = covered - PAGE + at_t
    load = ((slot >= 0) & (slot < n))[:, None] & (at_d < DIM)[None, :]
    was = tl.load(newest_at, mask=load, other=0.0).to(tl.float32)
    now = tl.load(x_at + slot.to(tl.int64)[:, None] * stride_t, mask=load, other=0.0).to(tl.float32)
    # A value that is not a number differs from itself, so its page is made again.
    changed = tl.max(tl.max((was != now).to(tl.int32), 1), 0)
    good = (covered > 0) & (covered <= n) & (changed == 0)
    tl.store(first_ptr + line, tl.where(good, (covered - 1) // PAGE, 0))
    slot = n - PAGE + at_t
    load = (slot >= 0)[:, None] & (at_d < DIM)[None, :]
    newest = tl.load(x_at + slot.to(tl.int64)[:, None] * stride_t, mask=load, other=0.0)
    # Other threads may still be reading what is written now.
    tl.debug_barrier()
    tl.store(newest_at, newest, mask=load)
    tl.store(covered_ptr + line, n)


@triton.jit(do_not_specialize=["heads", "n_pages"])
def _renewed(
    x_ptr, filled_ptr, from_ptr, first_ptr, second_ptr, stride_b, stride_g, stride_t, heads, n_pages,
    PAGE: tl.constexpr, PAGES: tl.constexpr, UNROLL: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    MEAN: tl.constexpr, LINES: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Summaries of those of SPAN times PAGES pages that `_compared` wants for any head, which are mostly none."""
    line = tl.program_id(1)
    lines = tl.arange(0, LINES)
    wanted = tl.min(tl.load(from_ptr + lines, mask=lines < tl.num_programs(1), other=2147483647), 0)
    n = tl.load(filled_ptr + line // heads)
    newest = (n - 1) // PAGE
    at_d = tl.arange(0, BLOCK_D)
    x_at = x_ptr + (line // heads).to(tl.int64) * stride_b + (line % heads).to(tl.int64) * stride_g + at_d[None, :]
    begin = tl.program_id(0) * PAGES * SPAN
    for first in range(tl.maximum(begin, wanted // PAGES * PAGES), tl.minimum(begin + PAGES * SPAN, newest + 1), PAGES):
        page = first + tl.arange(0, PAGES)
        low, high = _reduced(x_at, page, n, stride_t, PAGE, PAGES, UNROLL, DIM, BLOCK_D, MEAN)
        out = (line.to(tl.int64) * n_pages + page)[:, None] * DIM + at_d[None, :]
        store = (page <= newest)[:, None] & (page < n_pages)[:, None] & (at_d < DIM)[None, :]
        tl.store(first_ptr + out, low.to(first_ptr.dtype.element_ty), mask=store)
        if not MEAN:
            tl.store(second_ptr + out, high.to(second_ptr.dtype.element_ty), mask=store)


def launch(x: Tensor, page_tokens: int, mean: bool, pages: int = 0, warps: int = 0) -> tuple[Tensor, Tensor]:
    """Means twice, or smallest and largest values, [B, G, P, D].

    Args:
        pages: pages of a program; a default if 0.
        warps: warps of a program; a default if 0.
    """
    batch, heads, n_tokens, dim = x.shape
    n_pages = -(-n_tokens // page_tokens)
    first = x.new_empty((batch, heads, n_pages, dim))
    second = first if mean else torch.empty_like(first)
    pages = pages or _pages(page_tokens)
    _summaries[(triton.cdiv(n_pages, pages), batch * heads)](
        x, first, second, x.stride(0), x.stride(1), x.stride(2), heads, n_tokens, n_pages,
        PAGE=page_tokens, PAGES=pages, UNROLL=min(16, page_tokens), DIM=dim, BLOCK_D=triton.next_power_of_2(dim),
        MEAN=mean, num_warps=warps or (4 if pages >= 8 else 1),
    )  # fmt: skip
    return first, second


def _pages(page_tokens: int) -> int:
    """Pages of a program."""
    return 8 if page_tokens <= 32 else 2


def renew(x: Tensor, filled: Tensor, kept: KeptPages) -> None:
    """Runs both kernels; arguments as in `renew_pages`."""
    batch, heads, _, dim = x.shape
    page, pages, block_d = kept.newest.shape[2], _pages(kept.newest.shape[2]), triton.next_power_of_2(dim)
    first, second = kept.summaries[0], kept.summaries[-1]
    n_pages = first.shape[2]
    _compared[(batch * heads,)](
        x, filled, kept.newest, kept.covered, kept.first, x.stride(0), x.stride(1), x.stride(2), heads,
        PAGE=page, DIM=dim, BLOCK_D=block_d, num_warps=4 if page * block_d <= 4096 else 8,
    )  # fmt: skip
    _renewed[(triton.cdiv(n_pages, pages * SPAN), batch * heads)](
        x, filled, kept.first, first, second, x.stride(0), x.stride(1), x.stride(2), heads, n_pages,
        PAGE=page, PAGES=pages, UNROLL=min(16, page), DIM=dim, BLOCK_D=block_d, MEAN=len(kept.summaries) == 1,
        LINES=triton.next_power_of_2(batch * heads), SPAN=SPAN, num_warps=4 if pages >= 8 else 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["kv_heads", "group", "n_pages"])
def _bounds_scores(
    q_ptr, low_ptr, high_ptr, out_ptr, stride_qb, stride_qh, stride_lb, stride_lg, stride_lp, stride_hb, stride_hg,
    stride_hp, kv_heads, group, n_pages,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The best bound of PAGES pages over the query heads of one key-value head."""
    batch = (tl.program_id(1) // kv_heads).to(tl.int64)
    kv = (tl.program_id(1) % kv_heads).to(tl.int64)
    page = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    at_d = tl.arange(0, BLOCK_D)
    at_r = tl.arange(0, ROWS)
    d_mask = (at_d < DIM)[None, :]
    real = at_r < group
    q_at = q_ptr + batch * stride_qb + (kv * group + at_r)[:, None] * stride_qh + at_d[None, :]
    q = tl.load(q_at, mask=real[:, None] & d_mask, other=0.0)
    load = (page < n_pages)[:, None] & d_mask
    at = page.to(tl.int64)[:, None]
    low = tl.load(low_ptr + batch * stride_lb + kv * stride_lg + at * stride_lp + at_d[None, :], mask=load, other=0.0)
    high = tl.load(high_ptr + batch * stride_hb + kv * stride_hg + at * stride_hp + at_d[None, :], mask=load, other=0.0)
    wide = q.to(tl.float32)
    above = tl.trans(tl.maximum(wide, 0.0).to(q.dtype))
    below = tl.trans(tl.minimum(wide, 0.0).to(q.dtype))
    s = dot(low, below, dot(high, above, None, WIDEN, PRECISION), WIDEN, PRECISION)
    best = tl.max(tl.where(real[None, :], s, float("-inf")), 1)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * n_pages + page, best, mask=page < n_pages)


def bounds_scores(q: Tensor, low: Tensor, high: Tensor, pages: int = 64, warps: int = 2) -> Tensor:
    """Runs the kernel; arguments and result as in `page_scores`."""
    batch, kv_heads, n_pages, dim = low.shape
    group = q.shape[1] // kv_heads
    out = torch.empty((batch, kv_heads, n_pages), dtype=torch.float32, device=q.device)
    _bounds_scores[(triton.cdiv(n_pages, pages), batch * kv_heads)](
        q, low, high, out, q.stride(0), q.stride(1), *low.stride()[:3], *high.stride()[:3], kv_heads, group, n_pages,
        DIM=dim, BLOCK_D=max(16, triton.next_power_of_2(dim)), ROWS=max(16, triton.next_power_of_2(group)),
        PAGES=pages, **precision(q), num_warps=warps,
    )  # fmt: skip
    return out
