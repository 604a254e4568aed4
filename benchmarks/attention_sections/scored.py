"""Prompts under patterns that choose blocks by score: the whole of it and its parts, beside dense attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from attention_ours import DIM, SCALE
from attention_peers import BACKENDS, dense
from torch import Tensor

from attention_sections.bench import Bench, Part
from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit.runtime.attention.patterns._scored import Scored
from prunekit.runtime.attention.patterns.antidiagonal import Antidiagonal
from prunekit.runtime.attention.patterns.block_topk import BlockTopk
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit_kernels.block_scores import portable, reference, scored_lists
from prunekit_kernels.block_sparse_prefill import BlockLists, block_sparse_prefill
from prunekit_kernels.page_summaries import block_means
from prunekit_kernels.page_summaries.reference import means_reference


def run(bench: Bench) -> None:
    part = Part(bench, "scored")
    with part.case("check"):
        check(bench, part)
    for n in (300,) if bench.rehearse else (131072, 32768):
        prompt(bench, n)


def check(bench: Bench, part: Part) -> None:
    """Scores, means and lists on a ragged shape against the references."""
    torch.manual_seed(5)
    n = 300 if bench.rehearse else 1111
    q, k = (torch.randn(1, h, n, DIM, dtype=torch.bfloat16) for h in (8, 2))
    here = [t.to(bench.on) for t in (q, k)]
    square = portable.Tile(128, 128, 64, 8, 3)
    for stride, every in (
        ((16, 1), (16, 4)) if bench.rehearse else ((16, 1), (16, 2), (16, 4), (8, 8), (32, 1), (64, 1))
    ):
        how = (stride, every, 128, 128, 0, True, SCALE)
        expected = reference.folded_scores(q.double(), k.double(), *how)
        for tile in (None,) if bench.rehearse or (stride, every) != (16, 1) else (None, square):
            got = portable.folded(*here, *how, tile)
            part.check(f"antidiagonal scores {stride} {every} {tile or ''}", got.cpu(), expected, 2e-3)
    fine = k.half()
    means = block_means(fine.to(bench.on), 128)
    part.check("means", means.cpu(), means_reference(fine.double(), 128), 1e-3)
    for keep, mass in ((3, 0.0), (0, 0.5), (0, 0.0)):
        given = torch.randint(-8 if not mass else 0, 64, (4, 9, 9)).float() / 64
        width = 9 if not keep else min(9, max(keep, 4))
        arguments = (128, 128, n, n, 0, True, keep, mass, 1, 1, width, False)
        mine = portable.select(given.to(bench.on), *arguments)
        for name, a, b in zip("cpi", mine, reference.select_reference(given, *arguments), strict=True):
            part.check(f"select {keep} {mass} {name}", a.cpu().float(), b.float(), 0.0)


def prompt(bench: Bench, n: int) -> None:
    part = Part(bench, "scored", f"B1 S{n}")
    q, k, v = bench.draw(n)
    blocks = -(-n // 128)
    found: dict[str, float] = {}
    # Rows of r blocks keep min(r, keep): a tenth of the triangle.
    keep = max(1, round(blocks * (1 - 0.9**0.5)))
    parts: dict[str, dict[str, float]] = {}
    for name, pattern in patterns(keep).items():
        with part.case(name):
            parts[name] = pattern_parts(bench, part, name, pattern, q, k, v)
            found[name] = parts[name]["all_ms"]
    pieces(bench, part, keep, q, k)
    with part.case("dense list"):
        whole = block_lists(Dense(), n, n, device=bench.on)
        found["ours over all blocks"] = part.time(
            "ours over all blocks", lambda: block_sparse_prefill(q, k, v, whole, scale=SCALE)[0], plain=True,
            flops=4.0 * DIM * n * (n + 1) / 2 * bench.heads,
        )  # fmt: skip
    with part.case("dense cudnn"):
        found["dense cudnn"] = part.time("dense cudnn", dense(BACKENDS["dense cudnn"], q, k, v), plain=True)
        for name, times in parts.items():
            if not part.failed():
                times["times_cudnn"] = found["dense cudnn"] / times["all_ms"]
            part.write(f"{name}: parts", **times)
            print("  ", *(f"{label} {value:.3f}" for label, value in times.items()))
    part.ratios(found)


def patterns(keep: int) -> dict[str, Scored]:
    """What is timed by name, each keeping `keep` blocks of a row."""
    return {
        "block_topk": BlockTopk(keep_blocks=keep), "antidiagonal": Antidiagonal(stride=16, keep_blocks=keep),
        "antidiagonal, stride 32": Antidiagonal(stride=32, keep_blocks=keep),
        "antidiagonal, stride 64": Antidiagonal(stride=64, keep_blocks=keep),
        "antidiagonal, one run in 2": Antidiagonal(keep_blocks=keep, query_step=2),
        "antidiagonal, one run in 4": Antidiagonal(keep_blocks=keep, query_step=4),
        "antidiagonal, stride 8, one run in 8": Antidiagonal(stride=8, keep_blocks=keep, query_step=8),
    }  # fmt: skip


def pattern_parts(
    bench: Bench, part: Part, name: str, pattern: Scored, q: Tensor, k: Tensor, v: Tensor
) -> dict[str, float]:
    """Times of choosing blocks, of attention to them and of both, in ms, and the share of choosing."""
    blocks = -(-q.shape[2] // 128)
    scoring = part.time(f"{name}: scores and lists", lambda: pattern.prompt_lists(q, k, SCALE))
    lists = pattern.prompt_lists(q, k, SCALE)
    pairs = lists.touched / (bench.heads * blocks * (blocks + 1) / 2)
    out = block_sparse_prefill(q, k, v, lists, scale=SCALE)[0]
    part.check_rows(f"{name} {q.shape[2]}", out, q, k, v, listed_rule(lists))
    attention = part.time(
        f"{name}: attention", lambda: block_sparse_prefill(q, k, v, lists, scale=SCALE),
        flops=4.0 * DIM * 128 * 128 * lists.touched, density=pairs,
    )  # fmt: skip
    share = scoring / (scoring + attention)
    both = part.time(
        f"{name}: all", lambda: block_sparse_prefill(q, k, v, pattern.prompt_lists(q, k, SCALE), scale=SCALE),
        density=pairs, scoring_share=share,
    )  # fmt: skip
    return {"scores_ms": scoring, "attention_ms": attention, "all_ms": both, "share": share,
            "share_by_difference": 1 - attention / both}  # fmt: skip


def listed_rule(lists: BlockLists) -> Callable[[Tensor], Tensor]:
    """Of positions of queries, the keys up to theirs in the blocks that lists name by head, bool [H, rows, T]."""
    heads, rows, width = lists.indices.shape
    on = lists.indices.device
    listed = torch.zeros(heads, rows, -(-lists.n_keys // 128), dtype=torch.bool, device=on)
    head, row, slot = (torch.arange(width, device=on) < lists.counts[..., None]).nonzero(as_tuple=True)
    listed[head, row, lists.indices[head, row, slot].long()] = True
    keys = torch.arange(lists.n_keys, device=on)
    return lambda rows: listed[:, rows // 128][:, :, keys // 128] & (keys <= rows[:, None])


def pieces(bench: Bench, part: Part, keep: int, q: Tensor, k: Tensor) -> None:
    """Scores without lists, and lists of random scores."""
    n = q.shape[2]
    with part.case("scores alone"):
        folded = n // 16
        flops = 2.0 * DIM * 16 * folded * (folded + 1) / 2 * bench.heads
        wide = (portable.Tile(128, 256, 64, 8, 3), portable.Tile(128, 128, 64, 8, 3))
        for tile in (None,) if bench.rehearse else wide:
            part.time(f"antidiagonal scores alone, {tile or 'default'}",
                      lambda: portable.folded(q, k, 16, 1, 128, 128, 0, True, SCALE, tile), flops=flops)  # fmt: skip
    with part.case("choice alone"):
        blocks = -(-n // 128)
        scores = torch.rand(bench.heads, blocks, blocks, device=bench.on)
        part.time("lists from scores", lambda: scored_lists(scores, n, n, keep=keep))
