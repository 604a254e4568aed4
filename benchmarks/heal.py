"""Figures before, after the cut, after the repair and after healing, as JSON lines.

    python benchmarks/heal.py --minutes 3 --out benchmarks/results/heal.jsonl
    python benchmarks/heal.py --train lora --lr 5e-4 --data wikitext2
    python benchmarks/heal.py --rows "repaired, healed;vib, repaired;vib, healed" --dtype bfloat16 --batch 32
    python benchmarks/heal.py --data teacher@wikitext2=14 wikitext2 --task multiple_choice:arc_easy --task copying
    python benchmarks/heal.py --out benchmarks/results/heal.jsonl --table

One search serves all rows of FinerCut: its order is replayed. Rows of `vib` learn masks for the same fraction of block
parameters, each anew. Each row is a run of the pipeline, so what is measured was written, loaded in fresh processes and
checked. Calibration, repair and healing see text that evaluation does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import made_with, record

_ROWS = "which rows, semicolon between: cut; repaired; healed; repaired, healed; vib; vib, repaired; vib, healed"


def base(given: argparse.Namespace, by: dict[str, Any]) -> dict[str, Any]:
    """A recipe without repair and healing."""
    from prunekit.evaluate.specs import parse_task

    asked = [parse_task(text) for text in given.task]
    tasks = [{"task": task.name, "name": task.label, **task.options()} for task in asked]
    whole = {"remove": round(given.remove - given.neurons, 6), "of": "params"}
    steps: list[dict[str, Any]] = [{"remove": "sublayers", "by": by, "budget": whole}]
    if given.neurons:
        narrow = {"remove": given.neurons, "of": "params", "multiple_of": 16, "within": "group"}
        steps.append({"remove": "neurons", "by": {"score": "wanda"}, "budget": narrow})
    return {
        "schema": 1,
        "model": {"source": given.source, "device": given.device},
        "calibrate": {"sequences": given.calibrate, "length_tokens": 256},
        "steps": steps,
        "evaluate": {
            "perplexity": {"sequences": given.sequences, "length_tokens": given.length},
            **({"tasks": tasks} if tasks else {}),
        },
    }


def text(spec: str) -> dict[str, Any]:
    """A text of the mixture: `NAME[=WEIGHT]`, or `teacher@PROMPTS[:TOKENS][=WEIGHT]` where the teacher goes on."""
    name, _, weight = spec.partition("=")
    data, _, prompts = name.partition("@")
    prompts, _, tokens = prompts.partition(":")
    found: dict[str, Any] = {"data": data}
    found |= {"prompts": prompts} if prompts else {}
    found |= {"prompt_tokens": int(tokens)} if tokens else {}
    return {**found, **({"weight": float(weight)} if weight else {})}


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
        "compile": given.compile,
        **({"top_k": given.top_k} if given.top_k else {}),
    }
    return {"cut": {}, "repaired": {"repair": repair}, "healed": {"heal": heal},
            "repaired, healed": {"repair": repair, "heal": heal}}  # fmt: skip


def learned(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Rows whose units are chosen by learned masks: what stands beside the recipe without steps."""
    learn = {
        "method": "vib",
        "remove": given.vib_remove.split(","),
        "budget": {"remove": given.remove, "of": "params", "multiple_of": given.vib_multiple},
        "data": [text(spec) for spec in given.data],
        "length_tokens": given.vib_length,
        "steps": given.vib_steps,
        "batch": given.vib_batch,
        "dtype": given.dtype,
        "check_every": max(1, given.vib_steps // 4),
        "variant": given.vib_variant,
    }
    after = variants(given)
    names = {"vib": "cut", "vib, repaired": "repaired", "vib, healed": "healed"}
    return {row: {"learn": learn, **after[name]} for row, name in names.items()}


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a variant."""
    from prunekit import pipeline
    from prunekit.core.files import write_json
    from prunekit.core.recipe import parse_recipe

    with tempfile.TemporaryDirectory(prefix="prunekit-heal-") as scratch:
        wanted = given.rows.split(";")
        plain = base(given, {})
        plain.pop("steps")
        recipes = {row: {**plain, **parts} for row, parts in learned(given).items() if row in wanted}
        if set(wanted) & set(variants(given)):
            search = {"search": "finercut", "candidates": given.candidates, "distance": "loss"}
            made = pipeline.make_plan(parse_recipe(base(given, search)), talk=print)
            order = Path(scratch) / "order.json"
            write_json(order, {"results": [made.orders[0].to_json()]})
            replayed = base(given, {"search": "replay", "file": str(order)})
            recipes |= {row: {**replayed, **after} for row, after in variants(given).items() if row in wanted}
        for number, (name, recipe) in enumerate(recipes.items()):
            print(f"{name} ...", flush=True)
            result = pipeline.run(parse_recipe(recipe), Path(scratch) / str(number), talk=print)
            yield {
                "row": name,
                "layout": result.made.layout.kind,
                "params": [result.before["params"], result.after["params"]],
                "block_params": [result.before["block_params"], result.after["block_params"]],
                "perplexity": [side.get("perplexity") for side in (result.before, result.cut, result.after)],
                "figures": [side.get("figures") for side in (result.before, result.cut, result.after)],
                "heal": dict(result.heal),
                "learn": dict(result.made.learn),
                "repair_error": result.made.repair.get("error"),
                "verified": result.verified.ok,
                "seconds": {key: round(value, 1) for key, value in result.seconds.items()},
            }


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the rows were made."""
    return {
        "source": given.source,
        "remove": given.remove,
        "neurons": given.neurons,
        "candidates": given.candidates,
        "evaluation": [given.sequences, given.length],
        **made_with(given.device),
    }


def table(file: Path) -> str:
    """Markdown: a line a figure; of each row that was run what it wrote, and before them the model before the cut."""
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    columns: dict[str, dict[str, float]] = {"before": _figures(found[0], 0)}
    for row in found:
        cut, after = _figures(row, 1), _figures(row, 2)
        name = f"{row['remove']:.0%}, {row['row']}"
        if row["heal"] and row["row"] == "repaired, healed":
            columns[f"{row['remove']:.0%}, repaired"] = cut
        columns[name] = after
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in columns["before"]:
        cells = [f"{column[name]:.3g}" if name in column else "" for column in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _figures(row: dict[str, Any], side: int) -> dict[str, float]:
    """What was measured before (0), after the cut and the repair (1) or at the end (2)."""
    perplexity = row["perplexity"][side]
    return {} if perplexity is None else {"perplexity": perplexity, **(row["figures"][side] or {})}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--remove", type=float, default=0.25, help="fraction of block parameters")
    parser.add_argument("--neurons", type=float, default=0.0, help="part of it that goes as neurons, by wanda")
    parser.add_argument("--candidates", default="pairs")
    parser.add_argument("--calibrate", type=int, default=10, help="sequences of 256 tokens for the search")
    parser.add_argument("--repair", type=int, default=64, help="sequences of 256 tokens for the repair")
    parser.add_argument("--method", default="distill")
    parser.add_argument(
        "--data", nargs="+", default=["teacher", "wikitext2"], help="texts: NAME[@PROMPTS[:TOKENS]][=WEIGHT]"
    )
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
    parser.add_argument("--compile", action="store_true", help="heal with compiled blocks")
    parser.add_argument("--task", action="append", default=[], help="also measured, as `prunekit evaluate` takes it")
    parser.add_argument("--sequences", type=int, default=20, help="evaluation windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--vib-remove", default="neurons,kv_groups,sublayers", help="kinds of units, comma between")
    parser.add_argument("--vib-variant", default="faster", choices=("full", "fast", "faster"))
    parser.add_argument("--vib-multiple", type=int, default=32, help="neurons that stay are multiples of this")
    parser.add_argument("--vib-steps", type=int, default=300)
    parser.add_argument("--vib-batch", type=int, default=16)
    parser.add_argument("--vib-length", type=int, default=256, help="tokens of a sequence that masks are learned on")
    parser.add_argument("--rows", default="cut;repaired;healed;repaired, healed", help=_ROWS)
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--table", action="store_true", help="print what `--out` holds instead")
    given = parser.parse_args()
    if given.table:
        print(table(given.out))
        return
    about = facts(given)
    record(rows(given), about, given.out)


if __name__ == "__main__":
    main()
