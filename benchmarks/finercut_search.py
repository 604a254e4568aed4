"""FinerCut's search against the plain loop that it is defined by: the same order, with how many runs, in what time.

    python benchmarks/finercut_search.py --out benchmarks/results/finercut_search.jsonl
    python benchmarks/finercut_search.py --device cuda --sequences 10 --length 256 --ways lazy plain exact margin

`plain` runs every candidate at every step as a whole forward of the model with the removed sub-layers bypassed, and
compares all logits. `exact` runs every candidate too, but each from the first sub-layer on that it changes. `lazy` is
what `search: finercut` does. Each runs in a process of its own, after a check that sub-layers one by one are the model
and that distances are those of masked models. Orders must be equal. `margin` runs the lazy search on the recorded
distances of an exact one while it allows for less than it should: how much less, until the order is wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from record import asked, record
from torch import Tensor

from prunekit.calibrate.batches import token_batch
from prunekit.calibrate.stack import Stack
from prunekit.checkpoint.sources import resolve
from prunekit.evaluate.memory import peak_memory
from prunekit.modeling.load import load_model, load_tokenizer
from prunekit.modeling.modeling_prunekit import blocks_of, bypass
from prunekit.plan.cost import unit_cost
from prunekit.search._candidates import candidates
from prunekit.search._distances import DISTANCES
from prunekit.search._evaluator import Evaluator
from prunekit.search._greedy import Greedy
from prunekit.search._memory import Trust
from prunekit.structure.view import ModelView

# How many times the losses that the search allows for are allowed for: 1 is what it does.
LOSSES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
# Float32 sums in another order, relative to the distance.
TOLERANCE = 1e-3


class Bench:
    """Model, data and what a run counts."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        folder = resolve(chosen.model).folder
        self.chosen = chosen
        self.view = ModelView.open(folder)
        self.model = load_model(folder, chosen.dtype, chosen.device)
        tokenizer = load_tokenizer(folder)
        self.inputs = {"input_ids": token_batch(tokenizer, "wikitext2", chosen.sequences, chosen.length, chosen.seed)}
        self.total = sum(self.cost(s.address, "params") for s in self.view.sublayers)

    def cost(self, address: str, of: str) -> float:
        return unit_cost(self.view, address, of)

    def evaluator(self) -> Evaluator:
        return Evaluator(Stack(self.model), self.inputs, self.cost)

    def enough(self, removed: frozenset[str]) -> bool:
        share = sum(self.cost(address, "params") for address in removed) / self.total
        return share >= self.chosen.remove and len(removed) >= self.chosen.removals

    def now(self) -> float:
        if self.chosen.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


def check(bench: Bench) -> None:
    """Sub-layers one by one are the model; distances are those of masked models."""
    stack = Stack(bench.model)
    state = stack.enter({"input_ids": bench.inputs["input_ids"][:1]})
    hidden = state.hidden
    for i in range(len(stack.addresses)):
        hidden = stack.run(i, hidden, state)
    with torch.no_grad():
        expected = bench.model(input_ids=bench.inputs["input_ids"][:1].to(bench.model.device), use_cache=False).logits
    if not torch.equal(stack.finish(hidden, state), expected):
        raise SystemExit("the stack is not the model")
    evaluator = bench.evaluator()
    evaluator.begin(bench.chosen.distance)
    a = evaluator.addresses
    some: list[tuple[str, ...]] = [(a[0],), (a[7],), (a[10], a[11]), (a[-3],), (a[-1],)]
    plain = Plain(bench)
    for found, units in zip(evaluator.distances(some), some, strict=True):
        wanted = plain.distance(frozenset(units))
        if abs(found - wanted) > TOLERANCE * wanted:
            raise SystemExit(f"without {units} the distance is {wanted}, the evaluator says {found}")


class Plain:
    """Whole forwards of masked models."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.measure = DISTANCES[bench.chosen.distance]
        self.blocks = blocks_of(bench.model)
        self.addresses = Stack(bench.model).addresses
        self.ids = bench.inputs["input_ids"].to(bench.model.device)
        following = torch.cat([self.ids[:, 1:], torch.full_like(self.ids[:, :1], -1)], dim=1).flatten()
        self.reference = self.measure.prepare(self.logits(frozenset()), following if self.measure.text else None)
        self.evaluations = self.runs = 0

    def logits(self, removed: frozenset[str]) -> Tensor:
        with torch.no_grad(), self.masked(removed):
            found: Tensor = self.bench.model(input_ids=self.ids, use_cache=False).logits
        return found.flatten(0, 1)

    @contextmanager
    def masked(self, removed: frozenset[str]) -> Iterator[None]:
        undos = []
        for address in removed:
            _, block, kind = address.split(".")
            undos.append(bypass(self.blocks[int(block)], kind))
        yield
        for undo in undos:
            undo()

    def distance(self, removed: frozenset[str]) -> float:
        self.evaluations += 1
        self.runs += len(self.addresses) - len(removed)
        values = self.measure.values(self.reference, self.logits(removed))
        total, count = self.measure.total(values, [self.ids.shape[1]] * self.ids.shape[0])
        return float(total) / count

    def search(self, after_step: Callable[[tuple[str, ...], float], None]) -> None:
        chosen = self.bench.chosen
        removed, base = frozenset[str](), 0.0
        while not self.bench.enough(removed):
            found = {
                units: self.distance(removed.union(units))
                for units in candidates(chosen.candidates, self.addresses, removed, frozenset())
            }
            saved = {u: sum(self.bench.cost(a, chosen.per) for a in u) if chosen.per else 1.0 for u in found}
            best = min(found, key=lambda units: (found[units] - base) / saved[units])
            base, removed = found[best], removed.union(best)
            after_step(best, base)


def run(way: str, bench: Bench) -> dict[str, Any]:
    """One search, with the state of the counters after every step."""
    steps: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    if way == "plain":
        plain = Plain(bench)
        counts: Callable[[], tuple[float, float]] = lambda: (plain.evaluations, plain.runs)  # noqa: E731
    else:
        evaluator = bench.evaluator()
        counts = lambda: (evaluator.evaluations, evaluator.sublayer_runs())  # noqa: E731
    begin, begin_cpu = bench.now(), time.process_time()

    def after_step(units: Sequence[str], distance: float) -> None:
        evaluations, runs = counts()
        steps.append(
            {
                "units": list(units),
                "distance": distance,
                "evaluations": round(evaluations, 2),
                "sublayer_runs": round(runs, 1),
                "seconds": round(bench.now() - begin, 3),
                "cpu_seconds": round(time.process_time() - begin_cpu, 3),
            }
        )

    with peak_memory(bench.chosen.device) as used:
        if way == "plain":
            plain.search(after_step)
        else:
            evaluator.begin(bench.chosen.distance)
            greedy = Greedy(
                evaluator, bench.chosen.candidates, bench.chosen.per, 0.0, None if way == "exact" else Trust()
            )
            while not bench.enough(evaluator.removed):
                greedy.step()
                after_step(greedy.steps[-1].units, greedy.steps[-1].distance)
    found = {"way": way, "load_before": round(load, 1), "load_after": round(os.getloadavg()[0], 1)}
    found["peak_host_mib"] = round(used.host_bytes / 2**20)
    found["peak_gpu_mib"] = None if used.device_bytes is None else round(used.device_bytes / 2**20)
    return {**found, "steps": steps}


class Recorded:
    """Stands for an evaluator whose distances are known already."""

    def __init__(self, evaluator: Evaluator, table: dict[tuple[frozenset[str], int], float]) -> None:
        self.addresses, self.protected = evaluator.addresses, evaluator.protected
        self.weights, self.distance, self.cost = evaluator.weights, evaluator.distance, evaluator.cost
        self.mean, self.width = evaluator.mean, evaluator.width
        self.removed: frozenset[str] = frozenset()
        self.base = tuple(0.0 for _ in self.weights)
        self.table = table
        self.evaluations = 0.0

    def measure(self, sets: Sequence[frozenset[str]], part: int) -> list[float]:
        self.evaluations += len(sets) * self.weights[part]
        return [self.table[removed, part] for removed in sets]

    def move(self, removed: frozenset[str], base: Sequence[float]) -> None:
        self.removed, self.base = removed, tuple(base)


def margin(bench: Bench) -> dict[str, Any]:
    """How little the search may allow for until its order is wrong."""
    evaluator = bench.evaluator()
    evaluator.begin(bench.chosen.distance)
    table: dict[tuple[frozenset[str], int], float] = {}
    measure = evaluator.measure

    def recording(sets: Sequence[frozenset[str]], part: int) -> list[float]:
        found = measure(sets, part)
        table.update({(removed, part): distance for removed, distance in zip(sets, found, strict=True)})
        return found

    evaluator.measure = recording  # type: ignore[method-assign]
    exact = Greedy(evaluator, bench.chosen.candidates, bench.chosen.per, 0.0)
    while not bench.enough(evaluator.removed):
        exact.step()
    rows = []
    for losses in LOSSES:
        trust = Trust()
        eased = {
            name: 1 - losses * (1 - getattr(trust, name)) for name in ("near", "far", "least", "first_look", "fade")
        }
        replay = Recorded(evaluator, table)
        lazy = Greedy(replay, bench.chosen.candidates, bench.chosen.per, 0.0, dataclasses.replace(trust, **eased))  # type: ignore[arg-type]
        wrong = None
        for i, step in enumerate(exact.steps):
            lazy.step()
            if lazy.steps[-1].units != step.units:
                wrong = i
                break
        rows.append({"losses": losses, "first_wrong_step": wrong, "evaluations": round(replay.evaluations, 2)})
    return {
        "way": "margin",
        "steps": len(exact.steps),
        "exact_evaluations": len(table) / len(evaluator.weights),
        "margin": rows,
    }


def child(way: str, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--work", way, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def summary(found: dict[str, dict[str, Any]], marks: Sequence[int]) -> list[dict[str, Any]]:
    """Figures of every way at some numbers of steps, with ratios to the plain loop."""
    rows = []
    for mark in marks:
        at = {way: result["steps"][mark - 1] for way, result in found.items() if way != "margin"}
        row: dict[str, Any] = {"what": "finercut_search", "removals": mark}
        for way, step in at.items():
            row[way] = {key: value for key, value in step.items() if key not in ("units", "distance")}
        for way in at.keys() - {"plain"}:
            if "plain" in at:
                keys = ("evaluations", "sublayer_runs", "seconds", "cpu_seconds")
                row[f"plain_over_{way}"] = {key: round(at["plain"][key] / at[way][key], 1) for key in keys}
        rows.append(row)
    return rows


def facts(chosen: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "sequences", "length", "seed", "distance", "candidates", "per", "dtype", "device")
    return {
        **{name: getattr(chosen, name) for name in names},
        "gpu": torch.cuda.get_device_name() if chosen.device != "cpu" else None,
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        **commit(),
    }


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> dict[str, Any]:
    changed = asked("git", "status", "--porcelain", "--", "../prunekit")
    return {"commit": asked("git", "rev-parse", "--short", "HEAD"), "dirty": None if changed is None else bool(changed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--distance", choices=list(DISTANCES), default="js")
    parser.add_argument("--candidates", default="sublayers")
    parser.add_argument("--per", choices=["params", "flops"])
    parser.add_argument("--remove", type=float, default=0.25, help="fraction of block parameters to reach")
    parser.add_argument("--removals", type=int, default=0, help="sub-layers to remove at least")
    parser.add_argument("--marks", type=int, nargs="*", default=[], help="numbers of steps to report besides the last")
    parser.add_argument("--ways", nargs="+", default=["lazy", "plain"], choices=["lazy", "plain", "exact", "margin"])
    parser.add_argument("--threads", type=int, default=1 if not torch.cuda.is_available() else torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON lines file to add the results to")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.work:
        bench = Bench(chosen)
        check(bench)
        print(json.dumps(margin(bench) if chosen.work == "margin" else run(chosen.work, bench)))
        return
    found = {way: child(way, sys.argv[1:]) for way in chosen.ways}
    orders = {json.dumps([step["units"] for step in r["steps"]]) for way, r in found.items() if way != "margin"}
    rows = []
    searches = [result for way, result in found.items() if way != "margin"]
    if searches:
        last = min(len(result["steps"]) for result in searches)
        rows = summary(found, sorted({mark for mark in chosen.marks if mark < last} | {last}))
    rows += [{"what": "finercut_order", **result} for result in searches]
    if "margin" in found:
        rows.append({"what": "finercut_margin", **found["margin"]})
    record(rows, {"same_order": len(orders) <= 1, **facts(chosen)}, chosen.out)
    if len(orders) > 1:
        raise SystemExit("the orders differ")


if __name__ == "__main__":
    main()
