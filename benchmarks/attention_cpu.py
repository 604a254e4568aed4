"""Prompts and steps of each pattern on a CPU beside torch's dense attention, in the heads of SmolLM2-135M, float32.

    python benchmarks/attention_cpu.py [--out rows.jsonl] [--lengths 2048 8192] [--rounds 5]

Random queries, keys and values, 9 query and 3 key-value heads of 64. What is timed takes turns, on one thread by its
processor time, so that what else the machine does shows little. Dense attention is `scaled_dot_product_attention`
without repeated keys. Choosing blocks is counted; lists by position are made once for a length and are not. Before
anything is timed each prompt is compared with the plain reference, whose time of one call is noted, and a ratio is
given only if all agree; steps are checked by `prunekit bench attention --device cpu`. The blocks that a scored pattern
lists for random data tell nothing about text; `blocks` says how many it read here.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record import made_with, record
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from prunekit.runtime.attention.decode import step
from prunekit.runtime.attention.interface import prompt
from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit.runtime.attention.patterns._scored import is_scored
from prunekit.runtime.attention.policy import policy
from prunekit_kernels.block_sparse_prefill import BlockLists, cases
from prunekit_kernels.block_sparse_prefill.reference import reference

HEADS, KV_HEADS, DIM = 9, 3, 64


def patterns(length: int) -> dict[str, dict[str, Any]]:
    """Patterns by name, with the budgets of `attention_quality.py`."""
    blocks = length // 128
    return {
        "dense": {},
        "power": {"block_tokens": 128, "window_blocks": max(2, blocks // 8)},
        "streaming": {"block_tokens": 128, "sink_blocks": 1, "window_blocks": blocks // 4},
        "sink_window": {"sink_tokens": 4, "window_tokens": length // 4},
        "dilated": {"window_tokens": length // 4, "dilation": 2},
        "block_topk": {"keep_blocks": blocks // 3},
        "vertical_slash": {"vertical_blocks": blocks // 6, "slash_blocks": blocks // 6},
        "quest": {"page_tokens": 16, "budget_tokens": length // 4},
    }


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median processor time of each call in ms, after a first one; they take turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if number:
                found[name].append((time.process_time() - began) * 1e3)
    return {name: statistics.median(times) for name, times in found.items()}


def drawn(length: int, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as a model hands them over."""
    random = torch.Generator().manual_seed(length)
    shapes = ((1, queries, HEADS, DIM), (1, length, KV_HEADS, DIM), (1, length, KV_HEADS, DIM))
    q, k, v = (torch.randn(shape, generator=random).transpose(1, 2) for shape in shapes)
    return q, k.contiguous() if queries == 1 else k, v.contiguous() if queries == 1 else v


def prompts(length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of prompts, checked first."""
    q, k, v = drawn(length, length)
    runs: dict[str, Callable[[], object]] = {
        "dense, torch": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    }
    about: dict[str, dict[str, Any]] = {"dense, torch": {}}
    for name, options in patterns(length).items():
        pattern = policy({"pattern": name, **options}).pattern
        lists: BlockLists | None
        if is_scored(pattern):
            lists = pattern.prompt_lists(q, k, DIM**-0.5)
            if lists is None:
                continue
        else:
            lists = block_lists(pattern, length, length)
        began = time.process_time()
        expected, _ = reference(q, k, v, lists, DIM**-0.5)
        plain = (time.process_time() - began) * 1e3
        runs[name] = functools.partial(prompt, pattern, q, k, v, None, None)
        rows = -(-length // 128)
        about[name] = {
            "options": options, "error": cases.relative_error(prompt(pattern, q, k, v, None, None), expected),
            "blocks": lists.touched / lists.counts.shape[0] / (rows * (rows + 1) / 2), "reference_ms": plain,
        }  # fmt: skip
    times = in_turn(runs, rounds)
    right = all(row.get("error", 0.0) <= cases.RELATIVE[torch.float32] for row in about.values())
    for name, row in about.items():
        ratio = {"times_dense": times["dense, torch"] / times[name]} if right else {}
        yield {"what": name, "shape": f"prompt {length}", "ms": times[name], **ratio, **row}


def steps(length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of steps over a cache."""
    q, k, v = drawn(length, 1)
    runs: dict[str, Callable[[], object]] = {
        "dense, torch": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)
    }
    for name in ("dense", "power", "streaming", "sink_window", "block_topk", "quest"):
        pattern = policy({"pattern": name, **patterns(length)[name]}).pattern
        runs[name] = functools.partial(step, pattern, nn.Module(), q, k, v, None, None)
    times = in_turn(runs, 10 * rounds)
    for name, ms in times.items():
        yield {"what": name, "shape": f"step {length}", "ms": ms, "times_dense": times["dense, torch"] / ms}


def main() -> None:
    """Times every pattern at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines are added here")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192], help="multiples of 64 from 768 on")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    about = {**made_with("cpu"), "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "dtype": "float32", "threads": 1}
    with torch.no_grad():
        for length in options.lengths:
            record(prompts(length, options.rounds), about, options.out)
            record(steps(length, options.rounds), about, options.out)


if __name__ == "__main__":
    main()
