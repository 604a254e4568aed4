"""Perplexity against parameters removed, for every rule that chooses sub-layers: one table, one plot.

    python benchmarks/pruning_quality.py --device cuda
    python benchmarks/pruning_quality.py --plot docs/results/pruning_quality.png

SmolLM2-135M-Instruct loses sub-layers by each method until a share of its block parameters is gone. Calibration and
evaluation text share no article. What is removed is passed over in the loaded model, which computes exactly what the
cut checkpoint does (tests/contracts). With `--plot` the tables and the plot are made from what `--out` holds.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

SHARES = (0.10, 0.15, 0.20, 0.25, 0.30)
KV_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5)
TIME_SHARES = (0.10, 0.15, 0.20, 0.25, 0.30)
OTHERS = ("kv_bytes", "latency_ms")
SOURCE = "smollm2-135m-instruct"
# As budgets of recipes count.
ENOUGH = 0.995


@dataclass(frozen=True)
class Search:
    """A search, its calibration, the share of what at which it ends, and budgets to measure besides parameters."""

    knobs: dict[str, Any]
    sequences: int = 10
    length: int = 256
    data: str = "wikitext2"
    until: float = 0.30
    of: str = "params"
    also: tuple[str, ...] = ()
    shares: tuple[float, ...] = SHARES


@dataclass(frozen=True)
class Score:
    """A score of blocks. `span`: the knob that must equal the number of blocks removed."""

    name: str
    knobs: dict[str, Any] = field(default_factory=dict)
    span: str = ""


@dataclass(frozen=True)
class Repaired:
    """What another method removed, by its rows in `--out`, with output projections fitted anew by least squares."""

    of: str
    sequences: int = 64
    length: int = 256
    data: str = "wikitext2"


Method = Search | Score | Repaired
TABLE: dict[str, Method] = {
    "sub-layers, distance (the paper)": Search({"candidates": "sublayers"}),
    "sub-layers, distance, front protected 0.4": Search({"candidates": "sublayers", "protect_front": 0.4}),
    "sub-layers, per parameter": Search({"candidates": "sublayers", "per": "params"}),
    "attention only, distance": Search({"candidates": "attention"}, until=0.5, of="kv_bytes", also=OTHERS),
    "FFN only, distance": Search({"candidates": "ffn"}),
    "whole blocks, distance": Search({"candidates": "blocks"}),
    "pairs, distance": Search({"candidates": "pairs"}, also=OTHERS),
    "mixed, distance": Search({"candidates": "mixed"}),
    "mixed, per parameter": Search({"candidates": "mixed", "per": "params"}, also=OTHERS),
    "mixed, per KV byte": Search({"candidates": "mixed", "per": "kv_bytes"}, until=0.5, of="kv_bytes", also=OTHERS),
    "sub-layers, per millisecond": Search({"candidates": "sublayers", "per": "latency_ms"}, also=OTHERS),
    "mixed, per millisecond": Search({"candidates": "mixed", "per": "latency_ms"}, also=OTHERS),
    "pairs, loss": Search({"candidates": "pairs", "distance": "loss"}, also=OTHERS),
    "sub-layers, loss per parameter": Search({"candidates": "sublayers", "per": "params", "distance": "loss"}),
    "mixed, loss per parameter": Search({"candidates": "mixed", "per": "params", "distance": "loss"}),
    "pairs, loss, repaired": Repaired("pairs, loss"),
    "mixed, per parameter, repaired": Repaired("mixed, per parameter"),
    "mixed, loss per parameter, repaired": Repaired("mixed, loss per parameter"),
    "block influence": Score("block_influence"),
    "angular, best run": Score("angular", span="span"),
    "gardener": Score("gardener"),
    "last k": Score("last_k"),
    "random": Score("random"),
}
# What another distance, more text or exchanges after the greedy pass add to the best rows.
FURTHER: dict[str, Method] = {
    "pairs, loss, swaps": Search({"candidates": "pairs", "distance": "loss", "swaps": 8}, shares=(0.20, 0.25)),
    "sub-layers, loss per parameter, swaps": Search(
        {"candidates": "sublayers", "per": "params", "distance": "loss", "swaps": 8}, shares=(0.20, 0.25)
    ),
    "pairs, loss, 32 x 512": Search({"candidates": "pairs", "distance": "loss"}, 32, 512),
    "pairs, loss, 32 x 512, swaps": Search(
        {"candidates": "pairs", "distance": "loss", "swaps": 8}, 32, 512, shares=(0.20, 0.25)
    ),
    "mixed, loss per parameter, 32 x 512": Search(
        {"candidates": "mixed", "per": "params", "distance": "loss"}, 32, 512
    ),
    "mixed, loss per parameter, 32 x 512, swaps": Search(
        {"candidates": "mixed", "per": "params", "distance": "loss", "swaps": 8}, 32, 512, shares=(0.20, 0.25)
    ),
    "pairs, loss, 32 x 512, repaired": Repaired("pairs, loss, 32 x 512"),
    "pairs, loss, 32 x 512, repaired on 240 x 512": Repaired("pairs, loss, 32 x 512", 240, 512),
    "mixed, loss per parameter, 32 x 512, repaired": Repaired("mixed, loss per parameter, 32 x 512"),
    "pairs, kl": Search({"candidates": "pairs", "distance": "kl"}),
    "mixed, kl per parameter": Search({"candidates": "mixed", "per": "params", "distance": "kl"}),
}


class Bench:
    """The model, its structure, and how one cut is measured."""

    def __init__(self, folder: Path, device: str, sequences: int, length: int) -> None:
        from prunekit.calibrate.batches import token_batch
        from prunekit.calibrate.stack import Stack
        from prunekit.modeling.load import load_model, load_tokenizer
        from prunekit.plan.cost import cost
        from prunekit.structure.view import ModelView

        self.view = ModelView.open(folder)
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, "float32", device)
        self.stack = Stack(self.model)
        self.total = cost(self.view)
        self.ids = token_batch(self.tokenizer, "wikitext2_eval", sequences, length)
        self.batches: dict[tuple[str, int, int], Any] = {}
        self._latency: dict[str, float] = {}

    def batch(self, search: Search | Repaired) -> dict[str, Any]:
        from prunekit.calibrate.batches import token_batch

        key = (search.data, search.sequences, search.length)
        if key not in self.batches:
            self.batches[key] = {"input_ids": token_batch(self.tokenizer, *key)}
        return self.batches[key]

    def evaluator(self, search: Search) -> Any:
        from prunekit.plan.cost import unit_cost
        from prunekit.search._evaluator import Evaluator

        return Evaluator(self.stack, self.batch(search), partial(unit_cost, self.view))

    def latency(self, address: str) -> float:
        """Milliseconds of a sub-layer on the usual calibration batch."""
        if not self._latency:
            evaluator = self.evaluator(Search({}))
            self._latency = {a: evaluator.cost(a, "latency_ms") for a in self.stack.addresses}
        return self._latency[address]

    def share(self, removed: list[str], of: str) -> float:
        """Share of the block parameters, of the KV bytes or of the blocks' time that is gone."""
        from prunekit.plan.cost import unit_cost

        if of == "latency_ms":
            return sum(map(self.latency, removed)) / sum(map(self.latency, self.stack.addresses))
        whole = self.total.block_params if of == "params" else self.total.kv_bytes_per_token
        return sum(unit_cost(self.view, address, of) for address in removed) / whole

    def repaired(self, removed: list[str], by: Repaired) -> dict[Any, Any]:
        """Output matrices fitted to make up for what is missing, by the modules that hold them."""
        from prunekit.modeling.modeling_prunekit import blocks_of, output_projection
        from prunekit.repair.least_squares import LeastSquares

        found = LeastSquares().fit(self.stack, self.batch(by), frozenset(removed), {})
        places = {address: address.split(".") for address in found.projections}
        return {
            output_projection(blocks_of(self.model)[int(number)], kind): found.projections[address].weight
            for address, (_, number, kind) in places.items()
        }

    def row(self, removed: list[str], by: Repaired | None = None) -> dict[str, Any]:
        """Perplexity and shares of the model without these sub-layers."""
        from prunekit.evaluate.perplexity import perplexity
        from prunekit.modeling.modeling_prunekit import blocks_of, bypass
        from prunekit.plan.layout import choose_layout
        from prunekit.plan.plan import Plan

        undo: list[Callable[[], None]] = []
        try:
            for layer, weight in (self.repaired(removed, by) if by else {}).items():
                undo.append(partial(setattr, layer.weight, "data", layer.weight.data))
                layer.weight.data = weight.to(layer.weight)
            for address in removed:
                _, number, kind = address.split(".")
                undo.append(bypass(blocks_of(self.model)[int(number)], kind))
            found = perplexity(self.model, self.ids, batch_size=16 if self.model.device.type == "cuda" else 1)
        finally:
            for put_back in reversed(undo):
                put_back()
        return {
            "perplexity": round(found.perplexity, 3),
            "params_removed": round(self.share(removed, "params"), 4),
            "kv_bytes_removed": round(self.share(removed, "kv_bytes"), 4),
            "time_removed": round(self.share(removed, "latency_ms"), 4),
            "layout": choose_layout(self.view, Plan.make(self.view, removed)).kind if removed else "stock",
            "removed": removed,
        }


def prefix(bench: Bench, units: list[list[str]], share: float, of: str) -> list[str] | None:
    """The first units that make up the share; None where all of them do not."""
    removed: list[str] = []
    for part in units:
        if bench.share(removed, of) >= share * ENOUGH:
            break
        removed = removed + part
    return removed if bench.share(removed, of) >= share * ENOUGH else None


def searched(bench: Bench, search: Search, share: float, of: str = "params") -> tuple[list[list[str]], dict[str, Any]]:
    from prunekit.search.finercut import FinerCut

    evaluator = bench.evaluator(search)
    begin = time.perf_counter()
    order = FinerCut(**search.knobs).propose(
        evaluator, lambda removed: bench.share(sorted(removed), of) >= share * ENOUGH
    )
    return [list(step.units) for step in order.steps], {
        "search_s": round(time.perf_counter() - begin, 2),
        **order.provenance,
    }


def scored(bench: Bench, score: Score, share: float) -> list[list[str]]:
    """Blocks, lowest score first."""
    from prunekit.calibrate.collect import collect
    from prunekit.core.registry import SCORES
    from prunekit.scores._weights import CheckpointWeights

    (group,) = bench.view.groups("blocks")
    knobs = {**score.knobs, **({score.span: math.ceil(share * len(group.units) - 1e-9)} if score.span else {})}
    method = SCORES.get(score.name)(**knobs)
    stats = collect(bench.stack, bench.batch(Search({})), method.needs)
    values = method.score(group, CheckpointWeights(bench.view.checkpoint), stats).tolist()
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    return [[s.address for s in bench.view.blocks[i].sublayers] for i in order]


def rows(bench: Bench, name: str, method: Method, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`known`: rows of the results file, which repairs begin from."""
    if isinstance(method, Repaired):
        for row in known:
            if row["method"] == method.of and row["of"] == "params":
                measured = bench.row(row["removed"], method)
                yield {"method": name, "share": row["share"], "of": "params", **measured}
        return
    if isinstance(method, Score):
        for share in SHARES:
            removed = prefix(bench, scored(bench, method, share), share, "params") or []
            yield {"method": name, "share": share, "of": "params", **bench.row(removed)}
        return
    if method.knobs.get("swaps"):
        # Exchanges end in another set for every budget.
        for share in method.shares:
            units, facts = searched(bench, method, share)
            removed = [address for part in units for address in part]
            yield {"method": name, "share": share, "of": "params", **bench.row(removed), "search": facts}
        return
    units, facts = searched(bench, method, method.until, method.of)
    for of in ("params", *method.also):
        for share in {"params": SHARES, "kv_bytes": KV_SHARES, "latency_ms": TIME_SHARES}[of]:
            removed = prefix(bench, units, share, of)
            if removed is not None:
                yield {"method": name, "share": share, "of": of, **bench.row(removed), "search": facts}


def facts(bench: Bench) -> dict[str, Any]:
    import torch
    import transformers

    cuda = bench.model.device.type == "cuda"
    driver = "nvidia-smi --query-gpu=driver_version --format=csv,noheader"
    found = subprocess.run(driver.split(), capture_output=True, text=True, check=False).stdout if cuda else ""
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "driver": found.strip(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "evaluation": list(bench.ids.shape),
    }


def measure(given: argparse.Namespace) -> None:
    from prunekit.checkpoint.sources import resolve

    folder = given.model or resolve(SOURCE).folder
    bench = Bench(folder, given.device, *given.evaluation)
    about = facts(bench)
    known = {**TABLE, **FURTHER}
    names = given.methods or (list(TABLE) if not given.further else list(FURTHER))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    with given.out.open("a", encoding="utf-8") as sink:
        dense = {"method": "dense", "share": 0.0, "of": "params", **bench.row([]), **about}
        sink.write(json.dumps(dense) + "\n")
        print(f"dense: {dense['perplexity']}", flush=True)
        for name in names:
            if time.perf_counter() - begin > given.seconds:
                print(f"out of time before: {name}", flush=True)
                break
            for row in rows(bench, name, known[name], read(given.out)):
                sink.write(json.dumps({**row, **about}) + "\n")
                sink.flush()
                took = row.get("search", {}).get("search_s", "")
                print(f"{name}: {row['of']} {row['share']:.2f} {row['perplexity']:.2f} {took}", flush=True)


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a results file; of repeated measurements the last."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found[row["method"], row["of"], row["share"]] = row
    return list(found.values())


def table(found: list[dict[str, Any]], of: str = "params") -> str:
    """Markdown: a line a method, perplexity at each share; what was really removed in brackets where it differs."""
    shares = {"params": SHARES, "kv_bytes": KV_SHARES, "latency_ms": TIME_SHARES}[of]
    column = {"params": "params_removed", "kv_bytes": "kv_bytes_removed", "latency_ms": "time_removed"}[of]
    lines = ["| | " + " | ".join(f"{share:.0%}" for share in shares) + " |", "|---" * (len(shares) + 1) + "|"]
    for name in (*TABLE, *FURTHER):
        here = {row["share"]: row for row in found if row["method"] == name and row["of"] == of}
        if not here:
            continue
        cells = []
        for share in shares:
            row = here.get(share)
            if row is None:
                cells.append("")
                continue
            over = f" ({100 * row[column]:.1f})" if row[column] - share >= 0.005 else ""
            cells.append(f"{row['perplexity']:,.1f}{over}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], file: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 5.5), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # These leave the page, have one point, or lie on another line.
    left_out = ("random", "last k", "attention only, distance", "mixed, per KV byte")
    names = [name for name in (*TABLE, "pairs, loss, 32 x 512") if name not in left_out]
    for i, name in enumerate(names):
        line = sorted(
            (100 * row["params_removed"], row["perplexity"])
            for row in found
            if row["method"] == name and row["of"] == "params"
        )
        if line:
            look = {"color": colormaps["tab20"](i), "marker": "osD^vP*Xh<>pd8H"[i % 15], "markersize": 5}
            axes.plot(*zip(*line, strict=True), **look, linewidth=1.2, label=name)
    dense = next(row["perplexity"] for row in found if row["method"] == "dense")
    axes.axhline(dense, color="#888888", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(dense * 0.95, 350)
    ticks = [30, 40, 50, 60, 80, 100, 150, 200, 300]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("block parameters removed (%)")
    axes.set_ylabel("perplexity, WikiText-2 that calibration did not see")
    axes.set_title("SmolLM2-135M-Instruct, no training after the cut (dotted: before)", fontsize=11)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"checkpoint folder [{SOURCE}]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--evaluation", type=int, nargs=2, default=(80, 512), metavar=("WINDOWS", "TOKENS"))
    parser.add_argument("--methods", nargs="*", help="names from the table [all of it]")
    parser.add_argument("--further", action="store_true", help="longer searches and other distances instead")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no method after this time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/pruning_quality.jsonl"))
    parser.add_argument("--plot", type=Path, help="draw the plot from --out into this file, and print the tables")
    given = parser.parse_args()
    if not given.plot:
        measure(given)
        return
    found = read(given.out)
    plot(found, given.plot)
    for of in ("params", "kv_bytes", "latency_ms"):
        print(f"\n{of}\n\n{table(found, of)}")


if __name__ == "__main__":
    main()
