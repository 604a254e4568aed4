"""Steps over short lists: clusters of Hopper beside the portable kernel, over numbers of lists and their lengths.

    python benchmarks/attention_clusters.py --out rows.jsonl

`cluster_chunks` goes by these figures. One query a sequence, head size 128, bfloat16, pages of 16 tokens of a cache of
32,768, chosen at random. Each call follows a read of four times the L2 cache and replays a CUDA graph; every way is
timed twice, in turn forwards and backwards, and the shorter median counts. A way whose result is not that of the
reference, or of the portable kernel where lists are long, is named and not timed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from attention_decode import Shape, choose
from attention_device import Device, facts, in_turns
from torch import Tensor

from prunekit_kernels.sparse_decode import PageLists, cases, hopper_launch, portable
from prunekit_kernels.sparse_decode.chunks import Chunks
from prunekit_kernels.sparse_decode.op import hopper_chunks
from prunekit_kernels.sparse_decode.reference import decode_reference

Attention = Callable[[], tuple[Tensor, Tensor]]

CONTEXT, PAGE, DIM = 32768, 16, 128
# Sequences, query heads and key-value heads, from 2 to 128 lists.
SHAPES = (
    (1, 16, 2), (1, 28, 4), (1, 32, 8), (1, 12, 12), (1, 14, 14), (4, 28, 4), (3, 32, 8), (4, 32, 8), (12, 28, 4),
    (8, 32, 8), (12, 32, 8), (16, 32, 8),
)  # fmt: skip
TOKENS = (512, 1024, 2048, 4096, 8192)


def ways(q: Tensor, k: Tensor, v: Tensor, lists: PageLists) -> dict[str, Attention]:
    """The portable kernel, and clusters of every size that a card has SMs for; a star marks the one chosen."""
    where = (lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged)
    scale = q.shape[-1] ** -0.5
    early = portable.Tile(64, early=True)
    found: dict[str, Attention] = {
        "portable": partial(portable.launch, q, k, v, *where, lists.longest, lists.total, scale, early)
    }
    n_lists = lists.starts.numel()
    chosen = hopper_chunks(q, k, v, lists.starts.shape[1], PAGE, lists.paged, lists.longest)
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    for n in (1, 2, 4, 8):
        chunks = Chunks(n, lists.longest // n)
        if n * n_lists <= processors and 64 <= chunks.tokens <= 4096:
            name = f"{n} x {chunks.tokens}" + "*" * (chunks == chosen)
            found[name] = partial(hopper_launch.launch, q, k, v, *where, chunks, scale)
    return found


def wrong(run: Attention, expected: tuple[Tensor, Tensor]) -> str:
    """How far a result is from the expected one, or an empty string if it is close."""
    out, lse = run()
    error, off = cases.relative_error(out, expected[0]), float((lse - expected[1]).abs().max())
    close = error <= cases.RELATIVE[torch.bfloat16] and off <= cases.LSE_ABSOLUTE[torch.bfloat16]
    return "" if close else f"output {error:.1e}, log-sum-exp {off:.1e}"


def main() -> int:
    """Checks, times, prints a line for each shape; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--commit", default="", help="what the rows call the code; asked of git if not given")
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        parser.error("no Hopper device")
    device, bad = Device(False), 0
    rows: list[dict[str, object]] = [{"what": "facts", **facts(options.commit)}]
    for batch, heads, kv_heads in SHAPES:
        shape = Shape("", heads, kv_heads, DIM, batch, CONTEXT)
        q = torch.randn(batch, heads, 1, DIM, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(batch, kv_heads, CONTEXT, DIM, device="cuda", dtype=torch.bfloat16) for _ in "kv")
        for tokens in TOKENS:
            lists = choose(shape, PAGE, CONTEXT // tokens, False, "cuda")
            runs = ways(q, k, v, lists)
            where = (lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged, DIM**-0.5)
            expected = decode_reference(q, k, v, *where) if tokens <= 2048 else runs["portable"]()
            for name in list(runs):
                if text := wrong(runs[name], expected):
                    print(f"{shape} {tokens} {name} is wrong: {text}", flush=True)
                    del runs[name]
                    bad += 1
            best = in_turns(runs, lambda name, runs=runs: device.measure(runs[name])[0])
            about = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "tokens": tokens}
            rows += [{"what": name, **about, "median_us": us} for name, us in best.items()]
            figures = "; ".join(f"{name} {us:.1f}" for name, us in best.items())
            print(f"{batch} sequences, {heads} / {kv_heads} heads, {tokens} tokens: {figures}", flush=True)
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
