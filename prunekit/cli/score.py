"""`prunekit score`: the scores or the removal order of one method, without cutting anything."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from prunekit.core.types import Order, Scores

# Terminal tables stop here: a model has hundreds of thousands of neurons. --json and --output hold them all.
_SHOWN = 60


def score(
    model: options.Model,
    method: Annotated[str, typer.Option(help="Score or search; `prunekit methods list` shows them.")],
    kind: Annotated[str, typer.Option(help="Kind of unit to score.")] = "blocks",
    limit: Annotated[
        int | None, typer.Option(help="Stop a search after this many removals [half of the units].", min=1)
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Knob of the method as name=value; may be repeated.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the scores to this JSON file.", dir_okay=False)
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Score the units of a model; higher means keep. A search shows its removal order with the distances."""
    from prunekit import pipeline
    from prunekit.cli._files import require_free
    from prunekit.cli.prune import by
    from prunekit.core.files import write_json
    from prunekit.core.ranks import is_first_rank
    from prunekit.core.recipe import parse_recipe

    if output is not None:
        require_free(output, overwrite)
    out = Output(json=json, quiet=quiet)
    chosen = by(method, knobs(set_ or []))
    budget: dict[str, Any] = {"units": 1} if "score" in chosen else {"remove": 0.5}
    if limit is not None:
        if "score" in chosen:
            raise UsageError("`--limit` is for searches", why=f"`{method}` scores all units at once")
        budget = {"units": limit}
    step = {"remove": kind, "by": chosen, "budget": {**budget, "of": "units"}}
    recipe = parse_recipe({"schema": 1, "model": {"source": model}, "steps": [step]}, [])
    with out.progress() as progress:
        found = pipeline.make_plan(recipe, progress=progress, talk=out.talk).orders
    data = {"method": method, "kind": kind, "results": [part.to_json() for part in found]}
    out.result(_table(method, found), data)
    if output is not None and is_first_rank():
        write_json(output, data)
        out.written(output)


def knobs(expressions: list[str]) -> dict[str, Any]:
    """Knobs from `name=value` texts; values are read as YAML, so `exact=true` is a boolean.

    Raises:
        UsageError: for a text without `=` or a value that YAML cannot read.
    """
    import yaml

    found: dict[str, Any] = {}
    for expression in expressions:
        name, equals, value = expression.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"`--set {expression}` is not name=value", hint="for example --set protect_front=0.4")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(
                f"the value of `--set {expression}` cannot be read", why=" ".join(str(error).split())
            ) from error
    return found


def _table(method: str, found: Sequence[Scores | Order]) -> Table:
    from rich.table import Table

    from prunekit.core.types import Order

    table = Table(box=None, pad_edge=False, header_style="bold")
    orders = [part for part in found if isinstance(part, Order)]
    if orders:
        table.add_column("step", justify="right")
        table.add_column("removed")
        table.add_column("distance", justify="right")
        for number, step in enumerate((s for order in orders for s in order.steps), start=1):
            table.add_row(f"{number}", ", ".join(step.units), f"{step.distance:.6g}")
        return table
    table.add_column("unit, first to go first")
    table.add_column(f"{method} (higher = keep)", justify="right")
    pairs = [p for part in found if not isinstance(part, Order) for p in zip(part.values, part.units, strict=True)]
    for value, unit in sorted(pairs, key=lambda pair: pair[0])[:_SHOWN]:
        table.add_row(unit, f"{value:.6g}")
    if len(pairs) > _SHOWN:
        table.add_row(f"... {len(pairs) - _SHOWN:,} more; --json and --output hold all", "")
    return table
