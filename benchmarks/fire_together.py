"""What units chosen for each input save: work and time of one sequence, dense and chosen, of a folder with predictors.

    prunekit prune --recipe fire.yaml --output out/fire     # learn: {method: fire_together, ...}
    python benchmarks/fire_together.py out/fire --out fire.jsonl

Passes of the two take turns, and the median counts. Matrix products are counted by torch while they run.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from record import record


def flops(work: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products of some work."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def seconds(work: Callable[[], Any], device: str) -> float:
    """How long some work takes, the device's share included."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def rows(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A prompt, and tokens written behind it."""
    import torch

    from prunekit.calibrate.batches import token_batch
    from prunekit.modeling.dynamic import dynamic
    from prunekit.modeling.load import load_model, load_tokenizer

    model = load_model(given.folder, given.dtype, given.device)
    ids = token_batch(load_tokenizer(given.folder), "wikitext2_eval", 1, given.prompt).to(given.device)
    options = {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    work: dict[str, Callable[[], Any]] = {
        "prompt": lambda: model(ids, use_cache=False),
        "prompt and written": lambda: model.generate(ids, max_new_tokens=given.written, **options),
    }
    ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "dense": nullcontext,
        "chosen": lambda: dynamic(model, given.folder),
    }
    found = []
    with torch.no_grad():
        for what, do in work.items():
            took: dict[str, list[float]] = {way: [] for way in ways}
            counted = {}
            for repeat in range(given.repeats + 1):
                for way, on in ways.items():
                    with on():
                        if not repeat:
                            counted[way] = flops(do)
                        else:
                            took[way].append(seconds(do, given.device))
            medians = {way: statistics.median(values) for way, values in took.items()}
            found.append({"what": what, "flops": counted, "seconds": medians})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--written", type=int, default=64, help="tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    given = parser.parse_args()
    import torch
    import transformers

    device = torch.cuda.get_device_name() if given.device == "cuda" else platform.processor() or platform.machine()
    about = {"device": device, "torch": torch.__version__, "transformers": transformers.__version__,
             "prompt": given.prompt, "written": given.written, "dtype": given.dtype}  # fmt: skip
    record(rows(given), about, given.out)


if __name__ == "__main__":
    main()
