"""Accuracy after training on what each data-pruning metric keeps, against random: one table and plot a data set.

    python benchmarks/data_pruning.py --name polarity --train train.jsonl --dev dev.jsonl
    python benchmarks/data_pruning.py --name cifar10 --train train.zip --dev dev.zip --model path/to/dinov2
    python benchmarks/data_pruning.py --plot docs/results/data_pruning.png

Every example is embedded once. Each metric scores the training set once; a head of 64 hidden units then trains on what
it keeps, three seeds, and is judged on the dev set. `random` draws anew for each seed. All heads make the same number
of steps, so that fewer examples do not also mean less training. With `--plot` tables and plot are made from `--out`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

KEEPS = (0.8, 0.6, 0.4, 0.2)
SEEDS = (0, 1, 2)
STEPS, BATCH, WIDTH = 200, 128, 64
# Metric and knobs by the name in the table.
METRICS: dict[str, tuple[str, dict[str, Any]]] = {
    "el2n, 1 model": ("el2n", {"models": 1}),
    "el2n, 10 models": ("el2n", {"models": 10}),
    "grad_norm": ("grad_norm", {}),
    "forgetting": ("forgetting", {}),
    "memorization": ("memorization", {}),
    "influence_max": ("influence_max", {}),
    "influence_sum": ("influence_sum", {}),
    "ddd": ("ddd", {}),
    "ensemble_active": ("ensemble_active", {}),
    "supervised_prototypes": ("supervised_prototypes", {}),
    "ssl_prototypes": ("ssl_prototypes", {}),
    "loss": ("loss", {}),
    "length": ("length", {}),
}


def examples(path: Path, model: str | None, cache: Path) -> Any:
    from prunekit.datasets.encoder import encoder
    from prunekit.datasets.examples import Examples, Settings
    from prunekit.datasets.source import open_source

    source = open_source(path)
    return Examples(source, encoder(model, source, "cpu", 256), Settings(cache=cache))


def accuracy(train: Any, dev: Any, kept: np.ndarray, seed: int) -> float:
    """Accuracy on dev of a head that made STEPS steps on the kept examples."""
    import torch
    from torch.nn.functional import cross_entropy

    from prunekit.datasets.training import Head

    x, y = torch.tensor(train.vectors[kept]), torch.tensor(train.labels[kept]).long()
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    head = Head(x.mean(0), x.std(0).clamp(min=1e-6), train.n_classes, WIDTH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3, weight_decay=0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        rows = torch.randint(len(kept), (min(BATCH, len(kept)),), generator=generator)
        loss = cross_entropy(head(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        right = head(torch.tensor(dev.vectors)).argmax(-1).numpy() == dev.labels
    return float(right.mean())


def measured(name: str, train: Any, dev: Any, metrics: list[str], done: set[Any]) -> Iterator[dict[str, Any]]:
    """One row a metric, rule and fraction kept, less those that are done."""
    from prunekit.datasets.rules import Rule, choose, ranking
    from prunekit.datasets.score import made

    for data in (train, dev):
        data.vectors = np.load(data.embeddings_file)
    everything = np.arange(train.n)
    if ("all", "", 1.0) not in done:
        yield row(name, "all", "", 1.0, [accuracy(train, dev, everything, seed) for seed in SEEDS], train, dev)
    for keep in KEEPS:
        if ("random", "", keep) in done:
            continue
        found = []
        for seed in SEEDS:
            order = np.random.default_rng(1000 + seed).permutation(train.n)
            found.append(accuracy(train, dev, choose(order, Rule(keep=keep), train.n, train.labels), seed))
        yield row(name, "random", "", keep, found, train, dev)
    for label in metrics:
        metric, knobs = METRICS[label]
        left = [(rule, keep) for rule in ("hard", "easy") for keep in KEEPS if (label, rule, keep) not in done]
        if not left or (metric == "length" and train.source.kind == "image"):
            continue
        begin = time.perf_counter()
        scores = made(metric, knobs).score(train)
        seconds = time.perf_counter() - begin
        for rule, keep in left:
            kept = choose(ranking(scores, rule == "hard", 0), Rule(keep=keep), train.n, train.labels)
            found = [accuracy(train, dev, kept, seed) for seed in SEEDS]
            yield {**row(name, label, rule, keep, found, train, dev), "score_s": round(seconds, 1)}


def row(name: str, metric: str, rule: str, keep: float, found: list[float], train: Any, dev: Any) -> dict[str, Any]:
    import torch

    return {
        "data": name,
        "metric": metric,
        "rule": rule,
        "keep": keep,
        "accuracy": [round(value, 4) for value in found],
        "train": train.n,
        "dev": dev.n,
        "classes": train.n_classes,
        "model": Path(train.model.source).name,
        "processor": platform.machine(),
        "torch": torch.__version__,
    }


def load(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean accuracy and standard deviation over seeds, in per cent."""
    lines = [f"| metric | rule | {' | '.join(f'{keep:.0%}' for keep in KEEPS)} |", "|---|---|" + "---|" * len(KEEPS)]
    random = {r["keep"]: r for r in rows if r["metric"] == "random"}
    names = list(dict.fromkeys((r["metric"], r["rule"]) for r in rows if r["metric"] != "all"))
    for metric, rule in names:
        cells = []
        for keep in KEEPS:
            found = next(r["accuracy"] for r in rows if (r["metric"], r["rule"], r["keep"]) == (metric, rule, keep))
            text = f"{100 * statistics.mean(found):.1f} ± {100 * statistics.stdev(found):.1f}"
            better = statistics.mean(found) > statistics.mean(random[keep]["accuracy"])
            cells.append(f"**{text}**" if better and metric != "random" else text)
        lines.append(f"| {metric} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(r["data"] for r in rows))
    figure, axes = pyplot.subplots(len(names), 2, figsize=(13, 4.4 * len(names)), squeeze=False)
    for line, name in zip(axes, names, strict=True):
        for axis, rule in zip(line, ("hard", "easy"), strict=True):
            mine = [r for r in rows if r["data"] == name and r["rule"] in ("", rule)]
            whole = next(statistics.mean(r["accuracy"]) for r in mine if r["metric"] == "all")
            axis.axhline(100 * whole, color="grey", linestyle=":", label="all examples")
            for metric in dict.fromkeys(r["metric"] for r in mine if r["metric"] != "all"):
                number = list(METRICS).index(metric) if metric in METRICS else 0
                part = [r for r in mine if r["metric"] == metric]
                mean = [100 * statistics.mean(r["accuracy"]) for r in part]
                error = [100 * statistics.stdev(r["accuracy"]) for r in part]
                style = {"color": "black", "linewidth": 2.5} if metric == "random" else {"color": f"C{number % 10}"}
                mark = "o" if number < 10 else "s"
                x = [100 * r["keep"] for r in part]
                axis.errorbar(x, mean, error, marker=mark, markersize=4, capsize=2, label=metric, **style)
            axis.set(title=f"{name}, keep {rule}", xlabel="kept (%)", ylabel="dev accuracy (%)")
            axis.invert_xaxis()
    axes[0][1].legend(bbox_to_anchor=(1.02, 1), loc="upper left", fontsize=8)
    figure.tight_layout()
    figure.savefig(target, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name")
    parser.add_argument("--train", type=Path)
    parser.add_argument("--dev", type=Path)
    parser.add_argument("--model", help="source of the embedding model [MiniLM for text]")
    parser.add_argument("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS), metavar="METRIC")
    parser.add_argument("--cache", type=Path, default=Path("out/data_pruning"), help="embeddings and finished seeds")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_pruning.jsonl"))
    parser.add_argument("--plot", type=Path, help="print tables and write the plot from --out; measure nothing")
    options = parser.parse_args()
    if options.plot:
        rows = load(options.out)
        for name in dict.fromkeys(r["data"] for r in rows):
            mine = [r for r in rows if r["data"] == name]
            whole = next(r for r in mine if r["metric"] == "all")["accuracy"]
            print(f"\n## {name}: {mine[0]['train']:,} examples, {mine[0]['classes']} classes, {mine[0]['model']}")
            print(f"all examples: {100 * statistics.mean(whole):.1f} ± {100 * statistics.stdev(whole):.1f}\n")
            print(table(mine))
        plot(rows, options.plot)
        return
    train, dev = (examples(path, options.model, options.cache) for path in (options.train, options.dev))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    held = load(options.out) if options.out.is_file() else []
    done = {(r["metric"], r["rule"], r["keep"]) for r in held if r["data"] == options.name}
    # Row by row, so that a second run goes on where the first was stopped.
    with options.out.open("a", encoding="utf-8") as out:
        for found in measured(options.name, train, dev, options.metrics, done):
            out.write(json.dumps(found) + "\n")
            out.flush()
            mean = 100 * statistics.mean(found["accuracy"])
            print(f"{found['metric']:24} {found['rule']:5} {found['keep']:.0%} {mean:.1f}", flush=True)


if __name__ == "__main__":
    main()
