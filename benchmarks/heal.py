"""Figures before, after the cut, after the repair and after healing, as JSON lines.

    python benchmarks/heal.py --minutes 3 --out benchmarks/results/heal.jsonl
    python benchmarks/heal.py --train lora --lr 5e-4 --data wikitext2
    python benchmarks/heal.py --data teacher@wikitext2=14 wikitext2 --task multiple_choice:arc_easy --task copying

One search serves all rows: its order is replayed. Each row is a run of the pipeline, so what is measured was written,
loaded in fresh processes and checked. Calibration, repair and healing see text that evaluation does not.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def base(given: argparse.Namespace, by: dict[str, Any]) -> dict[str, Any]:
    """A recipe without repair and healing."""
    from prunekit.evaluate.specs import parse_task

    asked = [parse_task(text) for text in given.task]
    tasks = [{"task": task.name, "name": task.label, **task.options()} for task in asked]
    return {
        "schema": 1,
        "model": {"source": given.source, "device": given.device},
        "calibrate": {"sequences": given.calibrate, "length_tokens": 256},
        "steps": [{"remove": "sublayers", "by": by, "budget": {"remove": given.remove, "of": "params"}}],
        "evaluate": {
            "perplexity": {"sequences": given.sequences, "length_tokens": given.length},
            **({"tasks": tasks} if tasks else {}),
        },
    }


def text(spec: str) -> dict[str, Any]:
    """A text of the mixture: `NAME[=WEIGHT]`, or `teacher@PROMPTS[=WEIGHT]` where the teacher goes on from prompts."""
    name, _, weight = spec.partition("=")
    data, _, prompts = name.partition("@")
    return {"data": data, **({"prompts": prompts} if prompts else {}), **({"weight": float(weight)} if weight else {})}


def variants(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What follows the cut, by the name of the row."""
    repair = {"method": "least_squares", "calibrate": {"sequences": given.repair}}
    heal = {
        "method": given.method,
        "data": [text(spec) for spec in given.data],
        "sequences": given.texts,
        "length_tokens": given.train_length,
        "steps": given.steps,
        "minutes": given.minutes,
        "batch": given.batch,
        "lr": given.lr,
        "train": given.train,
        "dtype": given.dtype,
        "check_every": given.check_every,
        **({"top_k": given.top_k} if given.top_k else {}),
    }
    return {"cut": {}, "repaired": {"repair": repair}, "healed": {"heal": heal},
            "repaired, healed": {"repair": repair, "heal": heal}}  # fmt: skip


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a variant."""
    from prunekit import pipeline
    from prunekit.core.files import write_json
    from prunekit.core.recipe import parse_recipe

    with tempfile.TemporaryDirectory(prefix="prunekit-heal-") as scratch:
        search = {"search": "finercut", "candidates": given.candidates, "distance": "loss"}
        made = pipeline.make_plan(parse_recipe(base(given, search)), talk=print)
        order = Path(scratch) / "order.json"
        write_json(order, {"results": [order.to_json() for order in made.orders]})
        replayed = base(given, {"search": "replay", "file": str(order)})
        for number, (name, after) in enumerate(variants(given).items()):
            if name not in given.rows.split(";"):
                continue
            print(f"{name} ...", flush=True)
            result = pipeline.run(parse_recipe({**replayed, **after}), Path(scratch) / str(number), talk=print)
            yield {
                "row": name,
                "layout": made.layout.kind,
                "params": [result.before["params"], result.after["params"]],
                "block_params": [result.before["block_params"], result.after["block_params"]],
                "perplexity": [side.get("perplexity") for side in (result.before, result.cut, result.after)],
                "figures": [side.get("figures") for side in (result.before, result.cut, result.after)],
                "heal": dict(result.heal),
                "repair_error": result.made.repair.get("error"),
                "verified": result.verified.ok,
                "seconds": {key: round(value, 1) for key, value in result.seconds.items()},
            }


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the rows were made."""
    import torch

    from prunekit.report.folder import versions

    cuda = torch.cuda.is_available() and given.device != "cpu"
    changed = git("status", "--porcelain")
    return {
        "source": given.source,
        "remove": given.remove,
        "candidates": given.candidates,
        "evaluation": [given.sequences, given.length],
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "versions": versions(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": changed is None or bool(changed),
    }


def git(*words: str) -> str | None:
    """What git says; None where the code is no checkout."""
    here = Path(__file__).parent
    done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--remove", type=float, default=0.25, help="fraction of block parameters")
    parser.add_argument("--candidates", default="pairs")
    parser.add_argument("--calibrate", type=int, default=10, help="sequences of 256 tokens for the search")
    parser.add_argument("--repair", type=int, default=64, help="sequences of 256 tokens for the repair")
    parser.add_argument("--method", default="distill")
    parser.add_argument("--data", nargs="+", default=["teacher", "wikitext2"], help="texts: NAME[@PROMPTS][=WEIGHT]")
    parser.add_argument("--texts", type=int, help="sequences in all [what the texts hold]")
    parser.add_argument("--train-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--train", default="all", choices=("all", "lora"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--check-every", type=int, default=100)
    parser.add_argument("--task", action="append", default=[], help="also measured, as `prunekit evaluate` takes it")
    parser.add_argument("--sequences", type=int, default=20, help="evaluation windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--rows", default="cut;repaired;healed;repaired, healed", help="which rows, semicolon between")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    given = parser.parse_args()
    about = facts(given)
    for row in rows(given):
        line = json.dumps({**about, **row})
        print(line, flush=True)
        if given.out is not None:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
