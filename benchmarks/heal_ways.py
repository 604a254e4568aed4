"""What ways to choose what goes are worth after repair and after healing, at the same share: a row a way and share.

    python benchmarks/heal_ways.py --device cuda --dtype bfloat16 --texts 4000 --steps 500 --out ways.jsonl
    python benchmarks/heal_ways.py --out ways.jsonl --table

Each row is measured as cut, as repaired, and as repaired and healed. All rows share one search, one set of texts to
heal on (written by the dense model once) and one measurement of the dense model. Healed models are measured in the
memory they were trained in; the rows of `benchmarks/heal.py` went through files and checks in fresh processes. Rows
that `--out` holds already are passed over; no row is begun that would end after `--until` seconds, as far as those
before it tell.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from heal import facts, text
from record import record

WAYS = ("finercut", "vib", "block_influence", "wanda")
STATES = ("cut", "repaired", "healed")


class Bench:
    """What all rows share."""

    def __init__(self, given: argparse.Namespace, scratch: Path) -> None:
        self.given, self.scratch = given, scratch
        self.took = 0.0

    def recipe(self, parts: Mapping[str, Any]) -> Any:
        """A recipe with the model, the repair, the healing and the measurements of every row."""
        from prunekit.core.recipe import parse_recipe
        from prunekit.evaluate.specs import parse_task

        given = self.given
        asked = [parse_task(spec) for spec in given.task]
        tasks = [{"task": task.name, "name": task.label, **task.options()} for task in asked]
        return parse_recipe(
            {
                "schema": 1,
                "model": {"source": given.source, "device": given.device},
                "calibrate": {"sequences": given.calibrate, "length_tokens": 256},
                "repair": {
                    "method": "least_squares",
                    "calibrate": {"sequences": given.repair, "length_tokens": given.train_length},
                },
                "heal": {
                    "method": "distill",
                    "data": [text(spec) for spec in given.data],
                    "sequences": given.texts,
                    "length_tokens": given.train_length,
                    "steps": given.steps,
                    "batch": given.batch,
                    "lr": given.lr,
                    "dtype": given.dtype,
                    "check_every": given.steps,
                    "compile": given.compile,
                },
                "evaluate": {
                    "perplexity": {"sequences": given.sequences, "length_tokens": given.length},
                    **({"tasks": tasks} if tasks else {}),
                },
                **parts,
            }
        )

    def removes(self, way: str, share: float) -> dict[str, Any]:
        """The part of a recipe that says what goes."""
        budget: dict[str, Any] = {"remove": share, "of": "params"}
        given = self.given
        if way == "finercut":
            by = {"search": "replay", "file": str(self.order)}
            pairs = {"remove": round(share - given.neurons, 6), "of": "params"}
            steps: list[dict[str, Any]] = [{"remove": "sublayers", "by": by, "budget": pairs}]
            if given.neurons:
                narrow = {"remove": given.neurons, "of": "params", "multiple_of": 16, "within": "group"}
                steps.append({"remove": "neurons", "by": {"score": "wanda"}, "budget": narrow})
            return {"steps": steps}
        if way == "block_influence":
            return {"steps": [{"remove": "blocks", "by": {"score": way}, "budget": budget}]}
        if way == "wanda":
            budget |= {"multiple_of": 8, "within": "group"}
            return {"steps": [{"remove": "neurons", "by": {"score": way}, "budget": budget}]}
        learn = {
            "method": way,
            "remove": ["neurons", "kv_groups", "sublayers"],
            "budget": {**budget, "multiple_of": 32},
            "data": [text(spec) for spec in given.data],
            # The same texts as for healing, so that they are written once.
            "sequences": given.texts,
            "length_tokens": given.train_length,
            "steps": given.vib_steps,
            "batch": given.vib_batch,
            "dtype": given.dtype,
            "check_every": given.vib_steps,
        }
        return {"learn": learn}

    @cached_property
    def order(self) -> Path:
        """The order of FinerCut up to the largest share."""
        from prunekit.core.files import write_json
        from prunekit.pipeline import make_plan

        by = {"search": "finercut", "candidates": "pairs", "distance": "loss"}
        budget = {"remove": max(self.given.shares), "of": "params"}
        step = {"remove": "sublayers", "by": by, "budget": budget}
        made = make_plan(self.recipe({"steps": [step], "repair": None, "heal": None}), talk=_say)
        path = self.scratch / "order.json"
        write_json(path, {"results": [order.to_json() for order in made.orders]})
        return path

    @cached_property
    def dense(self) -> dict[str, Any]:
        """Figures of the dense model."""
        from prunekit.checkpoint.sources import resolve
        from prunekit.structure.view import ModelView

        recipe = self.recipe(self.removes("block_influence", 0.1))
        folder = resolve(self.given.source).folder
        measurer = self.measurer(recipe, ModelView.open(folder))
        return _figures(measurer, measurer.load(folder))

    def measurer(self, recipe: Any, view: Any) -> Any:
        """What measures a row's states."""
        from prunekit.core.progress import NULL_PROGRESS
        from prunekit.pipeline.inputs import tokenizer_for
        from prunekit.pipeline.measure import Measurer

        return Measurer(recipe, view, tokenizer_for(view, recipe), NULL_PROGRESS)

    def row(self, way: str, share: float) -> dict[str, Any]:
        """One way at one share, in all states."""
        from prunekit.heal.run import heal
        from prunekit.pipeline import make_plan
        from prunekit.pipeline.carry_out import Clock, made_from, replaced_of
        from prunekit.pipeline.healing import scene_of
        from prunekit.pipeline.repair import with_repair
        from prunekit.surgery import engine

        clock = Clock()
        recipe = self.recipe(self.removes(way, share))
        made = make_plan(recipe, talk=_say)
        clock.lap("plan")
        measurer, states = self.measurer(recipe, made.view), {}
        where = Path(tempfile.mkdtemp(dir=self.scratch))
        for state in STATES[:2]:
            made = made if state == "cut" else with_repair(recipe, made)
            folder = where / state
            folder.mkdir()
            engine.apply(made.view, made.plan, folder, layout=made.layout, replaced=replaced_of(made))
            clock.lap(f"write {state}")
            states[state] = _figures(measurer, measurer.load(folder))
            clock.lap(f"measure {state}")
        scene = scene_of(recipe, made.view, folder, made.layout.pairs, None, made_from(recipe, made), talk=_say)
        healed = heal(scene, where / "work")
        clock.lap("heal")
        states["healed"] = _figures(measurer, healed.model)
        clock.lap("measure healed")
        return {
            "way": way,
            "share": share,
            "layout": made.layout.kind,
            "params": [made.before.params, made.after.params],
            "block_params": [made.before.block_params, made.after.block_params],
            "dense": self.dense,
            **states,
            "heal": dict(healed.about),
            "learn": dict(made.learn),
            "seconds": clock.seconds,
        }


def _say(words: str) -> None:
    print(f"  {words}", flush=True)


def _figures(measurer: Any, model: Any) -> dict[str, float]:
    found = measurer.measure(model, model)
    return {"perplexity": found["perplexity"], **found.get("figures", {})}


def rows(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows that are missing, the smallest share first."""
    import shutil

    begun, longest = time.monotonic(), 0.0
    held = [(row["way"], row["share"]) for row in _held(given.out)]
    with tempfile.TemporaryDirectory(prefix="prunekit-ways-") as scratch:
        bench = Bench(given, Path(scratch))
        for way, share in [(way, share) for share in sorted(given.shares) for way in given.ways]:
            if (way, share) in held:
                continue
            if given.until is not None and time.monotonic() - begun + longest > given.until:
                print(f"{way} at {share:.0%}: no time left", flush=True)
                return
            print(f"{way} at {share:.0%} ...", flush=True)
            at = time.monotonic()
            yield bench.row(way, share)
            longest = max(longest, time.monotonic() - at)
            for folder in Path(scratch).glob("tmp*"):
                shutil.rmtree(folder)


def _held(out: Path | None) -> list[dict[str, Any]]:
    if out is None or not out.is_file():
        return []
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def table(held: list[dict[str, Any]]) -> str:
    """Markdown: a line a state of each row, figures beside each other, the dense model before them."""
    names = list(held[0]["dense"])
    lines = [
        "| way | block params removed | params | state | " + " | ".join(names) + " |",
        "|---" * (len(names) + 4) + "|",
    ]
    cells = [f"{held[0]['dense'][name]:.3g}" for name in names]
    lines.append(f"| dense | | {held[0]['params'][0] / 1e6:.1f} M | | " + " | ".join(cells) + " |")
    for row in sorted(held, key=lambda row: row["share"]):
        removed = 1 - row["block_params"][1] / row["block_params"][0]
        for state in STATES:
            cells = [f"{row[state][name]:.3g}" for name in names]
            about = f"| {row['way']} | {removed:.1%} | {row['params'][1] / 1e6:.1f} M | {state} | "
            lines.append(about + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.2, 0.3], help="fractions of block parameters")
    parser.add_argument("--neurons", type=float, default=0.0, help="part of it that FinerCut leaves to wanda neurons")
    parser.add_argument("--calibrate", type=int, default=10, help="sequences of 256 tokens for scores and search")
    parser.add_argument("--repair", type=int, default=200, help="sequences for the repair, as long as those of healing")
    parser.add_argument(
        "--data", nargs="+", default=["teacher", "wikitext2"], help="texts: NAME[@PROMPTS[:TOKENS]][=WEIGHT]"
    )
    parser.add_argument("--texts", type=int, help="sequences in all [what the texts hold]")
    parser.add_argument("--train-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="heal with compiled blocks")
    parser.add_argument("--vib-steps", type=int, default=300)
    parser.add_argument("--vib-batch", type=int, default=8)
    parser.add_argument("--task", action="append", default=[], help="also measured, as `prunekit evaluate` takes it")
    parser.add_argument("--sequences", type=int, default=20, help="evaluation windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--until", type=float, help="seconds after which no row is begun that would not end by then")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--table", action="store_true", help="print what `--out` holds instead")
    given = parser.parse_args()
    if given.table:
        print(table(_held(given.out)))
        return
    # What `facts` tells of a single cut is told by each row here.
    about = facts(argparse.Namespace(**vars(given), remove=max(given.shares), candidates="pairs"))
    about.pop("remove")
    record(rows(given), about, given.out)


if __name__ == "__main__":
    main()
