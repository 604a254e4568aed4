"""What sparse attention costs a model that was not trained with it: perplexity and pass keys under each pattern.

    python benchmarks/attention_quality.py --out rows.jsonl [--lengths 2048] [--windows 2] [--keys 3]
    python benchmarks/attention_quality.py --out rows.jsonl --device cuda --dtype bfloat16 --lengths 2048 8192

SmolLM2-135M-Instruct, in float32 on a CPU and as its files are on a GPU. The kernels take half precision alone: in
float32 a GPU runs the plain reference, so `--dtype bfloat16` is what measures them. Perplexity reads windows of
wikitext2_eval as prompts; a pass key is read in a prompt of the same length and written in steps over the cache. Beside
them stands the share of the blocks of dense attention that prompts read. Rows are appended as they come, and a pattern
whose row is there already is left out, so a run that was stopped goes on; so does one that ran out of `--seconds`.
Patterns on a grid are for images and videos and have no rows here.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from record import record
from torch import Tensor

from prunekit.calibrate.batches import token_batch
from prunekit.core.progress import NULL_PROGRESS
from prunekit.evaluate.perplexity import perplexity
from prunekit.evaluate.subject import open_subject
from prunekit.evaluate.tasks.passkey import Passkey
from prunekit.runtime import attach
from prunekit.runtime.attention import interface
from prunekit.runtime.attention.patterns._engine import density
from prunekit.runtime.attention.patterns._scored import is_scored
from prunekit.runtime.attention.policy import policy
from prunekit_kernels.block_sparse_prefill import BlockLists

SOURCE, TEXT = "smollm2-135m-instruct", "wikitext2_eval"


def patterns(length: int) -> list[dict[str, Any]]:
    """Patterns with budgets of about a quarter to a half of a prompt of this length."""
    blocks = length // 128
    return [
        {"pattern": "dense"},
        {"pattern": "sink_window", "sink_tokens": 4, "window_tokens": length // 4},
        {"pattern": "streaming", "block_tokens": 128, "sink_blocks": 1, "window_blocks": blocks // 4},
        {"pattern": "power", "block_tokens": 128, "window_blocks": max(2, blocks // 8)},
        {"pattern": "quest", "page_tokens": 16, "budget_tokens": length // 4},
        {"pattern": "block_topk", "keep_blocks": blocks // 3},
        {"pattern": "antidiagonal", "mass": 0.9, "stride": 16},
        {"pattern": "antidiagonal", "mass": 0.9, "stride": 32},
        {"pattern": "antidiagonal", "mass": 0.9, "stride": 64},
        {"pattern": "antidiagonal", "mass": 0.9, "stride": 16, "query_step": 2},
        {"pattern": "antidiagonal", "mass": 0.9, "stride": 16, "query_step": 4},
        {"pattern": "antidiagonal", "mass": 0.9, "stride": 8, "query_step": 8},
        {"pattern": "vertical_slash", "vertical_blocks": blocks // 6, "slash_blocks": blocks // 6},
        {"pattern": "dilated", "window_tokens": length // 4, "dilation": 2},
    ]


@contextmanager
def counted_blocks(shares: list[float], length: int) -> Iterator[None]:
    """Notes which share of the blocks of dense attention each prompt of `length` tokens reads, layer by layer.

    Shorter prompts are probes of the evaluation, which read everything.
    """
    run = interface.block_sparse_prefill

    def counted(q: Tensor, k: Tensor, v: Tensor, lists: BlockLists, **options: Any) -> tuple[Tensor, Tensor]:
        heads, rows = lists.counts.shape
        cols = -(-lists.n_keys // lists.block_k)
        if lists.n_queries == length:
            shares.append(lists.touched / (heads * (rows * (2 * cols - rows + 1) / 2)))
        return run(q, k, v, lists, **options)

    interface.block_sparse_prefill = counted
    try:
        yield
    finally:
        interface.block_sparse_prefill = run


def main() -> None:
    """Measures every pattern and appends its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048])
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--keys", type=int, default=3, help="pass keys; 0 leaves them out")
    parser.add_argument("--only", nargs="+", default=[], help="names of patterns; all if none is given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="of the weights; float32 on a CPU and that of the files elsewhere if not given")
    parser.add_argument("--source", default=SOURCE, help=f"{SOURCE}, or a folder that holds it")
    parser.add_argument("--text", default=TEXT, help=f"{TEXT}, or a file of text")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no pattern is begun after so many")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="sparse attention runs in plain torch")
    began = time.monotonic()
    subject = open_subject(options.source, options.device, options.dtype, 1)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    for length in options.lengths:
        windows = token_batch(subject.tokenizer, options.text, options.windows, length)
        task = Passkey(lengths=(length - 64,), limit=max(1, options.keys))
        prompts = task.prepare(task.load(), subject)
        for section in patterns(length):
            if options.only and section["pattern"] not in options.only:
                continue
            if time.monotonic() - began > options.seconds:
                return
            about = {
                "length": length, "windows": options.windows, "keys": options.keys, "source": SOURCE,
                "text": options.text, "torch": torch.__version__, "transformers": transformers.__version__,
                "machine": platform.machine(),
                "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device,
                "dtype": str(subject.model.dtype).removeprefix("torch."),
            }  # fmt: skip
            chosen = policy(section).pattern
            full = policy(chosen).section()
            same = json.loads(json.dumps(full))
            if any(row["options"] == same and all(row.get(k) == v for k, v in about.items()) for row in done):
                continue
            start = time.monotonic()
            shares: list[float] = []
            with attach(subject.model, chosen):
                with counted_blocks(shares, length):
                    measured = perplexity(subject.model, windows)
                right = task.run(prompts, subject, NULL_PROGRESS)["acc"].value if options.keys else None
            row = {
                "pattern": full["pattern"], "perplexity": measured.perplexity, "nll": measured.nll, "passkey": right,
                "density": None if is_scored(chosen) else density(chosen, length),
                "blocks": sum(shares) / len(shares) if shares else None,
                "seconds": round(time.monotonic() - start), "options": full,
            }  # fmt: skip
            record([row], about, options.out)


if __name__ == "__main__":
    main()
