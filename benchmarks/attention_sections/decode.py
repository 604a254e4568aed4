"""One step under Quest: page bounds, choosing pages, attention to them, beside attention to the whole cache."""

from __future__ import annotations

import torch
from attention_ours import DIM, SCALE
from attention_peers import BACKENDS, dense
from torch import Tensor, nn

from attention_sections.bench import Bench, Part
from prunekit.runtime.attention.decode import step
from prunekit.runtime.attention.patterns.quest import Quest
from prunekit_kernels.block_scores import reference as scores_reference
from prunekit_kernels.block_scores import select_blocks
from prunekit_kernels.page_summaries import page_bounds
from prunekit_kernels.page_summaries.reference import bounds_reference
from prunekit_kernels.sparse_decode import PageLists, sparse_decode
from prunekit_kernels.sparse_decode.reference import decode_reference


def run(bench: Bench) -> None:
    part = Part(bench, "decode")
    with part.case("check"):
        check(bench, part)
    shapes = ((2, 256),) if bench.rehearse else ((8, 131072), (8, 32768), (8, 8192), (1, 131072))
    for batch, context in shapes:
        one_step(bench, batch, context)


def check(bench: Bench, part: Part) -> None:
    """Scores, choice and attention of a step against float64."""
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, h, n, DIM, dtype=torch.float16) for h, n in ((8, 1), (2, 1111), (2, 1111)))
    pattern, here = Quest(16, 256), [t.to(bench.on) for t in (q, k, v)]
    scores = pattern.page_scores(here[0], pattern.summaries(here[1]))
    wide = pattern.page_scores(q.double(), pattern.summaries(k.double()))
    part.check("page scores", scores.cpu(), wide, 2e-3)
    table = select_blocks(scores.flatten(0, 1).unsqueeze(1), 1, 1111, block_q=1, block_k=16, q_offset=1110, keep=16,
                          sink=0, ascending=True)[2][:, 0, :16].unflatten(0, (2, 2))  # fmt: skip
    lists = PageLists.from_table(table, torch.full((2, 2), 247, device=bench.on), 2, 16, paged=False)
    expected, _ = decode_reference(
        *(t.double() for t in here), lists.indices, lists.starts, lists.tokens, 16, False, SCALE
    )
    part.check("quest step", step(pattern, nn.Module(), *here, None, SCALE), expected, 2e-3)
    for name, mine, other in zip(("low", "high"), page_bounds(here[1], 16), bounds_reference(k, 16), strict=True):
        part.check(f"page bounds {name}", mine.cpu(), other, 0.0)
    scores = torch.randn(40, 1, 700)
    mine = select_blocks(scores.to(bench.on), 1, 11193, block_q=1, block_k=16, q_offset=11192, keep=50,
                         ascending=True)  # fmt: skip
    other = scores_reference.select_reference(
        scores, 1, 16, 1, 11193, 11192, True, 50, 0.0, 1, 1, mine[2].shape[-1], True
    )
    for name, a, b in zip(("counts", "partials", "indices"), mine, other, strict=True):
        part.check(f"select {name}", a.cpu().float(), b.float(), 0.0)


def one_step(bench: Bench, batch: int, context: int) -> None:
    part = Part(bench, "decode", f"B{batch} T{context}")
    budget = 64 if bench.rehearse else 2048
    pattern = Quest(16, budget)
    torch.manual_seed(1)
    q = torch.randn(batch, bench.heads, 1, DIM, device=bench.on, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, bench.kv_heads, context, DIM, device=bench.on, dtype=torch.bfloat16) for _ in "kv")
    found: dict[str, float] = {}
    # Bytes of the key and the value of one token.
    row = 4 * DIM * batch * bench.kv_heads
    n_pages, keep = context // 16, budget // 16

    def choose() -> Tensor:
        scores = pattern.page_scores(q, bounds)
        return select_blocks(scores.flatten(0, 1).unsqueeze(1), 1, context, block_q=1, block_k=16,
                             q_offset=context - 1, keep=keep, sink=0, ascending=True)[2]  # fmt: skip

    def lists_of(table: Tensor) -> PageLists:
        pages = table[:, 0, :keep].unflatten(0, (batch, bench.kv_heads))
        return PageLists.from_table(pages, counts, bench.kv_heads, 16, paged=False)

    with part.case("page bounds"):
        bounds = page_bounds(k, 16)
        part.time("page bounds of the whole cache", lambda: page_bounds(k, 16), size=row * context / 2)
    with part.case("attention"):
        counts = torch.full((batch, bench.kv_heads), budget, dtype=torch.int32, device=bench.on)
        lists = lists_of(choose())
        found["attention to 2048 tokens"] = part.time(
            f"attention to {budget} tokens", lambda: sparse_decode(q, k, v, lists, scale=SCALE), size=row * budget
        )
    with part.case("choosing"):
        size = row * n_pages
        scored = part.time("page scores", lambda: pattern.page_scores(q, bounds), size=size)
        chosen = part.time("scores and top pages", choose, size=size)
        part.write("top pages alone", by_difference_ms=chosen - scored)
    with part.case("step"):
        found["step, choosing included"] = part.time(
            "step, choosing included", lambda: sparse_decode(q, k, v, lists_of(choose()), scale=SCALE),
            size=row * (budget + n_pages),
        )  # fmt: skip
    with part.case("whole list"):
        whole = PageLists.whole(torch.full((batch, bench.kv_heads), context, device=bench.on), context)
        found["whole list"] = part.time(
            "whole list", lambda: sparse_decode(q, k, v, whole, scale=SCALE), size=row * context
        )
    for name, backend in BACKENDS.items():
        with part.case(name):
            found[name] = part.time(name, dense(backend, q, k, v, causal=False), size=row * context)
    part.ratios(found)
