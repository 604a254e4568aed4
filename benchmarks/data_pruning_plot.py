"""Tables and plots of what `data_pruning.py` measured.

python benchmarks/data_pruning_plot.py >tables.md
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pruning import KEEPS, METRICS, RULES, load


def cell(found: Sequence[float]) -> str:
    return f"{100 * statistics.mean(found):.1f} ± {100 * statistics.stdev(found):.1f}"


def table(mine: dict[tuple[str, str, float], list[float]]) -> str:
    """Markdown: mean accuracy and standard deviation over seeds, in per cent."""
    lines = [f"| metric | rule | {' | '.join(f'{keep:.0%}' for keep in KEEPS)} |", "|---|---|" + "---|" * len(KEEPS)]
    for metric, rule in named(mine):
        cells = [cell(mine[metric, rule, keep]) for keep in KEEPS]
        marks = [verdict(mine, metric, rule, keep) for keep in KEEPS]
        cells = [f"**{text}**" if mark == "+" else text for text, mark in zip(cells, marks, strict=True)]
        lines.append(f"| {metric} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def named(mine: dict[tuple[str, str, float], list[float]]) -> list[tuple[str, str]]:
    """Metrics and rules that were measured, random first."""
    there = {(metric, rule) for metric, rule, _ in mine}
    return [one for one in [("random", ""), *((m, r) for m in METRICS for r in RULES)] if one in there]


def verdict(mine: dict[tuple[str, str, float], list[float]], metric: str, rule: str, keep: float) -> str:
    """+ better than random by more than both standard deviations together, - worse by as much, = neither."""
    own, chance = mine[metric, rule, keep], mine["random", "", keep]
    gap, noise = statistics.mean(own) - statistics.mean(chance), statistics.stdev(own) + statistics.stdev(chance)
    return "=" if abs(gap) <= noise else "+" if gap > 0 else "-"


def verdicts(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: against random at 80, 60, 40 and 20 %, one column a data set and judge."""
    columns = list(dict.fromkeys((r["data"], r["judge"]) for r in rows))
    parts = [
        {(r["metric"], r["rule"], r["keep"]): r["accuracy"] for r in rows if (r["data"], r["judge"]) == one}
        for one in columns
    ]
    lines = [
        f"| metric | rule | {' | '.join(', '.join(one) for one in columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for metric in METRICS:
        for rule in RULES:
            cells = [
                " ".join(verdict(mine, metric, rule, keep) for keep in KEEPS) if (metric, rule, 0.2) in mine else ""
                for mine in parts
            ]
            if any(cells):
                lines.append(f"| {metric} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(mine: dict[tuple[str, str, float], list[float]], title: str, target: Path) -> None:
    """A panel a metric: accuracy against share kept, hard and easy against random, with standard deviations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = [metric for metric in METRICS if (metric, "hard", KEEPS[0]) in mine]
    drawn, axes = pyplot.subplots(
        -(-len(metrics) // 5),
        5,
        figsize=(15, 2.9 * -(-len(metrics) // 5)),
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    for axis, metric in zip(axes.flat, metrics, strict=False):
        axis.axhline(100 * statistics.mean(mine["all", "", 1.0]), color="grey", linestyle=":", label="all examples")
        for name, rule, colour in (("random", "", "black"), (metric, "hard", "C3"), (metric, "easy", "C0")):
            found = [mine[name, rule, keep] for keep in KEEPS]
            mean, error = ([100 * f(one) for one in found] for f in (statistics.mean, statistics.stdev))
            x = [100 * keep for keep in KEEPS]
            axis.errorbar(x, mean, error, color=colour, marker="o", markersize=3, capsize=3, label=rule or name)
        axis.set_title(metric, fontsize=10)
        axis.tick_params(labelbottom=True)
    axes.flat[0].invert_xaxis()
    axes.flat[0].legend(fontsize=8)
    drawn.suptitle(title)
    drawn.supxlabel("kept (%)")
    drawn.supylabel("accuracy on dev (%)")
    drawn.savefig(target, dpi=70)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/results/data_pruning.jsonl"))
    parser.add_argument("--plots", type=Path, default=Path("docs/results"), help="folder of the plots")
    options = parser.parse_args()
    rows = load(options.rows)
    print(verdicts(rows))
    for name, judge in dict.fromkeys((r["data"], r["judge"]) for r in rows):
        mine = {
            (r["metric"], r["rule"], r["keep"]): r["accuracy"] for r in rows if (r["data"], r["judge"]) == (name, judge)
        }
        about = next(r for r in rows if (r["data"], r["judge"]) == (name, judge))
        title = f"{name}, judge {judge}: {about['train']:,} examples, {about['classes']} classes, {about['model']}"
        print(f"\n### {title}\n\nAll examples: {cell(mine['all', '', 1.0])}.\n\n{table(mine)}")
        figure(mine, title, options.plots / f"data_pruning_{name}_{judge}.png")


if __name__ == "__main__":
    main()
