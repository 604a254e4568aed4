"""What sparse attention costs a model that was not trained with it: perplexity and pass keys under each pattern.

    python benchmarks/attention_quality.py --out rows.jsonl [--length 2048] [--windows 2] [--keys 3]

SmolLM2-135M-Instruct in float32. Perplexity reads windows of wikitext2_eval as prompts; a pass key is read in a
prompt of the same length and written in steps over the cache. Rows are appended as they come, and a pattern whose row
is there already is left out, so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

from prunekit.calibrate.batches import token_batch
from prunekit.core.progress import NULL_PROGRESS
from prunekit.evaluate.perplexity import perplexity
from prunekit.evaluate.subject import open_subject
from prunekit.evaluate.tasks.passkey import Passkey
from prunekit.runtime import attach
from prunekit.runtime.attention.patterns._engine import density
from prunekit.runtime.attention.patterns._scored import is_scored
from prunekit.runtime.attention.policy import policy

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
        {"pattern": "vertical_slash", "vertical_blocks": blocks // 6, "slash_blocks": blocks // 6},
        {"pattern": "dilated", "window_tokens": length // 4, "dilation": 2},
    ]


def main() -> None:
    """Measures every pattern and appends its row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are appended here")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--keys", type=int, default=3, help="pass keys; 0 leaves them out")
    parser.add_argument("--only", nargs="+", default=[], help="names of patterns; all if none is given")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message="sparse attention runs in plain torch")
    subject = open_subject(SOURCE, options.device, None, 1)
    windows = token_batch(subject.tokenizer, TEXT, options.windows, options.length)
    task = Passkey(lengths=(options.length - 64,), limit=max(1, options.keys))
    prompts = task.prepare(task.load(), subject)
    done = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    about = {
        "length": options.length, "windows": options.windows, "keys": options.keys, "source": SOURCE, "text": TEXT,
        "torch": torch.__version__, "transformers": transformers.__version__, "machine": platform.machine(),
        "device": options.device,
    }  # fmt: skip
    for section in patterns(options.length):
        if options.only and section["pattern"] not in options.only:
            continue
        chosen = policy(section).pattern
        full = policy(chosen).section()
        if any(row["options"] == full and all(row[k] == v for k, v in about.items()) for row in done):
            continue
        began = time.monotonic()
        with attach(subject.model, chosen):
            measured = perplexity(subject.model, windows)
            right = task.run(prompts, subject, NULL_PROGRESS)["acc"].value if options.keys else None
        row = {
            "pattern": full["pattern"], "perplexity": measured.perplexity, "nll": measured.nll, "passkey": right,
            "density": None if is_scored(chosen) else density(chosen, options.length),
            "seconds": round(time.monotonic() - began), "options": full, **about,
        }  # fmt: skip
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
