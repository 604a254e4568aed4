"""What a sentence encoder is worth after a cut, by who chose it: raw, repaired and healed, as JSON lines.

    python benchmarks/encoders.py --pairs stsb_en.jsonl --out benchmarks/results/encoders.jsonl
    python benchmarks/encoders.py --pairs stsb_en.jsonl --methods shrp --remove 0.3 --states "raw;healed" --limit 500
    python benchmarks/encoders.py --out benchmarks/results/encoders.jsonl --table

Every method takes the same fraction of block parameters and is judged by the Spearman correlation of its cosines with
people's scores, and by the mean cosine of its vectors with the dense model's. A method chooses once; the states begin
from that one choice. `shrp` takes heads alone; in `magnitude+shrp` neurons go by magnitude before, as many as in
`magnitude`. It trains weights while it chooses, so a repair, which fits the dense model's matrices, does not apply to
it. Nothing is learned, fitted or healed on the text that is judged.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import made_with, record

METHODS = ("magnitude", "vib", "shrp", "magnitude+shrp")
# What heads take by magnitude of a fraction to remove: as much as they hold of the blocks' parameters.
HEADS = 1 / 3
STATES = ("raw", "repaired", "healed", "repaired, healed")


def chosen_by(given: argparse.Namespace, method: str, remove: float) -> dict[str, Any]:
    """The part of a recipe that chooses."""
    neurons = by_magnitude("neurons", remove * (1 - HEADS), multiple_of=given.multiple)
    if method == "magnitude":
        return {"steps": [by_magnitude("kv_groups", remove * HEADS), neurons]}
    learn = {**training(given), "method": method.rpartition("+")[2], "steps": given.learn_steps}
    if method == "vib":
        budget = {"remove": remove, "multiple_of": given.multiple}
        return {"learn": {**learn, "remove": ["neurons", "kv_groups"], "budget": budget}}
    routed = {**learn, "remove": ["kv_groups"], "lr": given.shrp_lr}
    if method == "shrp":
        return {"learn": {**routed, "budget": {"remove": remove}}}
    return {"steps": [neurons], "learn": {**routed, "budget": {"remove": remove * HEADS}}}


def by_magnitude(kind: str, remove: float, **budget: Any) -> dict[str, Any]:
    """A step by the size of weights, over all blocks at once."""
    by = {"remove": remove, "of": "params", "within": "model", **budget}
    return {"remove": kind, "by": {"score": "magnitude"}, "budget": by}


def training(given: argparse.Namespace) -> dict[str, Any]:
    """What learning and healing have in common."""
    return {
        "data": given.data,
        "length_tokens": given.train_length,
        "batch": given.batch,
        "check_every": given.check_every,
    }


def recipe_of(given: argparse.Namespace, method: str, remove: float, state: str) -> Any:
    """A recipe; the choice is the same for all states."""
    from prunekit.core.recipe import parse_recipe

    data: dict[str, Any] = {
        "schema": 1,
        "model": {"source": given.source, "device": given.device},
        "evaluate": {
            "embedding": {"data": "wikitext2_eval", "sequences": 64, "length_tokens": 64},
            "tasks": [{"task": "similarity", "name": "sts", "data": str(given.pairs), "limit": given.limit}],
        },
        **chosen_by(given, method, remove),
    }
    if "repaired" in state:
        data["repair"] = {"method": given.repair, "calibrate": {"sequences": given.fit, "length_tokens": 64}}
    if "healed" in state:
        data["heal"] = {**training(given), "method": "distill", "steps": given.heal_steps, "lr": given.heal_lr}
    return parse_recipe(data)


def states_of(given: argparse.Namespace, method: str) -> list[str]:
    """States that apply to a method."""
    wanted = [state.strip() for state in given.states.split(";")]
    return [state for state in wanted if "shrp" not in method or "repaired" not in state]


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a method, fraction and state; first the dense model."""
    from prunekit import pipeline
    from prunekit.core.progress import NULL_PROGRESS
    from prunekit.pipeline.inputs import tokenizer_for
    from prunekit.pipeline.measure import Measurer

    measurer: Any = None
    for remove in given.remove:
        for method in given.methods.split(","):
            first = recipe_of(given, method, remove, "raw")
            begin = time.perf_counter()
            with tempfile.TemporaryDirectory(prefix="prunekit-encoders-") as scratch:
                made = pipeline.make_plan(first, talk=print, work=Path(scratch) / "learn")
                chose = time.perf_counter() - begin
                if measurer is None:
                    tokenizer = tokenizer_for(made.view, first)
                    measurer = Measurer(first, made.view, tokenizer, NULL_PROGRESS)
                    dense = measurer.load(made.view.checkpoint.folder)
                    if not given.no_dense:
                        yield {"method": "dense", "state": "raw", "remove": 0.0, **measured(measurer, dense, dense)}
                for state in states_of(given, method):
                    recipe = recipe_of(given, method, remove, state)
                    found = finished(recipe, made, dense, Path(scratch), measurer)
                    yield {
                        "method": method,
                        "state": state,
                        "remove": remove,
                        "block_params": [made.before.block_params, made.after.block_params],
                        "params": [made.before.params, made.after.params],
                        **found,
                        "learn": dict(made.learn),
                        "kept": {address: len(units) for address, units in made.plan.keep.items()},
                        "chose_s": round(chose, 1),
                    }


def finished(recipe: Any, made: Any, dense: Any, scratch: Path, measurer: Any) -> dict[str, Any]:
    """What a state is worth: written, loaded again and measured."""
    from prunekit.pipeline.carry_out import made_from, replaced_of
    from prunekit.pipeline.healing import healed_in_place, scene_of
    from prunekit.pipeline.repair import with_repair
    from prunekit.surgery import engine

    begin, about = time.perf_counter(), {}
    if recipe.repair is not None:
        made = with_repair(recipe, replace(made))
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        engine.apply(made.view, made.plan, folder, layout=made.layout, replaced=replaced_of(made))
        if recipe.heal is not None:
            scene = scene_of(recipe, made.view, folder, made.layout.pairs, dense, made_from(recipe, made), talk=print)
            with tempfile.TemporaryDirectory(dir=scratch) as work:
                _, about = healed_in_place(scene, Path(work) / "heal", 5_000_000_000)
        seconds = time.perf_counter() - begin
        return {
            **measured(measurer, measurer.load(folder), dense),
            "repair_error": made.repair.get("error"),
            "heal": dict(about),
            "seconds": round(seconds, 1),
        }


def measured(measurer: Any, model: Any, dense: Any) -> dict[str, float]:
    """Figures of a model beside the dense one."""
    found = measurer.measure(model, dense)
    return {"spearman": round(found["figures"]["sts.spearman"], 4), "cosine": round(found["embedding_cosine"], 4)}


def facts(given: argparse.Namespace) -> dict[str, Any]:
    """Where and with what the rows were made."""
    import torch

    return {
        "source": given.source,
        "pairs": given.limit or "all",
        "threads": torch.get_num_threads(),
        **made_with(given.device),
    }


def table(file: Path) -> str:
    """Markdown: a line a fraction, method and length of learning, a column a state and length of healing.

    In a cell Spearman x 100, and the cosine behind it. Of two rows for one cell the later counts.
    """
    found = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    cells: dict[tuple[float, str, int], dict[str, dict[str, Any]]] = {}
    for row in found:
        key = (row["remove"], row["method"], row.get("learn", {}).get("steps", 0))
        cells.setdefault(key, {})[column_of(row)] = row
    shown = {column_of(row): STATES.index(row["state"]) for row in found}
    columns = sorted(shown, key=lambda column: (shown[column], len(column), column))
    lines = ["| asked | who chooses | steps | block parameters | " + " | ".join(columns) + " |"]
    lines.append("|---" * (4 + len(columns)) + "|")
    for (remove, method, steps), by_column in sorted(cells.items(), key=lambda cell: cell[0][0]):
        before, after = next(iter(by_column.values())).get("block_params", (1, 1))
        rows_of = [by_column.get(column) for column in columns]
        texts = ["" if row is None else f"{100 * row['spearman']:.1f} ({row['cosine']:.3f})" for row in rows_of]
        learned = f"{steps:,}" if steps else ""
        lines.append(f"| {remove:.0%} | {method} | {learned} | {after / before - 1:.1%} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def column_of(row: dict[str, Any]) -> str:
    """The state of a row, with the steps of its healing."""
    steps = row.get("heal", {}).get("steps")
    return row["state"] + (f", {steps} steps" if steps else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="all-minilm-l6-v2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--pairs", type=Path, help="rows of `s1`, `s2` and `score`, as the task `similarity` reads them"
    )
    parser.add_argument("--limit", type=int, help="pairs, from the start of the file [all]")
    parser.add_argument("--remove", type=float, nargs="+", default=[0.2, 0.3], help="fractions of block parameters")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma between")
    parser.add_argument("--states", default="raw;repaired;healed", help=f"semicolon between: {'; '.join(STATES)}")
    parser.add_argument("--no-dense", action="store_true", help="leave the row of the dense model out")
    parser.add_argument("--data", nargs="+", default=["wikitext2"], help="texts to learn from and to heal on")
    parser.add_argument("--train-length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--check-every", type=int, default=50)
    parser.add_argument("--learn-steps", type=int, default=400)
    parser.add_argument("--shrp-lr", type=float, default=1e-4)
    parser.add_argument("--heal-steps", type=int, default=400)
    parser.add_argument("--heal-lr", type=float, default=1e-4)
    parser.add_argument("--repair", default="mean_bias", help="of those that go with the family")
    parser.add_argument("--fit", type=int, default=256, help="sentences that repairs are fitted on")
    parser.add_argument("--multiple", type=int, default=32, help="neurons that stay are multiples of this")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--table", action="store_true", help="print what `--out` holds instead")
    given = parser.parse_args()
    if given.table:
        print(table(given.out))
        return
    if given.pairs is None:
        parser.error("--pairs FILE is needed")
    about = facts(given)
    record(rows(given), about, given.out)


if __name__ == "__main__":
    main()
