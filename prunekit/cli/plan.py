"""`prunekit plan`: what a recipe would remove, what that costs, and where the result would load."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.recipe import Recipe, load_recipe


def plan(
    recipe: options.Recipe,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this JSON file.", dir_okay=False)
    ] = None,
    set_: options.Set = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a recipe would remove and predict parameters, FLOPs, KV bytes and where the result loads.

    No weights are written. `prunekit apply` carries out the file that --output writes.
    """
    show_plan(load_recipe(recipe, list(set_ or [])), Output(json=json, quiet=quiet), output, overwrite)


def show_plan(recipe: Recipe, out: Output, file: Path | None = None, overwrite: bool = False) -> None:
    """Makes the plan of a recipe, prints it, and writes it where a file is given.

    Args:
        recipe: what to remove from which model.
        out: where to print.
        file: plan file to write.
        overwrite: allow an existing plan file.
    """
    from prunekit import pipeline
    from prunekit.cli._files import require_free
    from prunekit.plan.layout import loads
    from prunekit.report.layer_map import layer_map
    from prunekit.report.outcome import outcome

    if file is not None:
        require_free(file, overwrite)
    later = [name for name in ("repair", "heal") if getattr(recipe, name) is not None]
    if later:
        out.talk(f"a plan holds cuts alone: {' and '.join(f'`{n}`' for n in later)} come with `prunekit prune`")
    with out.progress() as progress:
        made = pipeline.make_plan(recipe, progress=progress, talk=out.talk)
    rows = layer_map(made.view, made.plan)
    before, after = asdict(made.before), asdict(made.after)
    where = loads(made.view, made.layout)
    data: dict[str, Any] = {
        "plan": made.plan.to_json(),
        "layout": made.layout.kind,
        "before": before,
        "after": after,
        "loads": where,
        "layer_map": [row.to_json() for row in rows],
        "orders": [order.to_json() for order in made.orders],
    }
    out.result(outcome(rows, before, after, where), data)
    if file is not None:
        made.plan.write(file)
        out.written(file)
