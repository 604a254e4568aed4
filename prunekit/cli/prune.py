"""`prunekit prune`: a recipe, or a model and a few options, to a pruned folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import ExpectationError, UsageError
from prunekit.core.recipe import Recipe, load_recipe, parse_recipe

_SHORT = "Without a recipe"


def prune(
    model: Annotated[
        str | None,
        typer.Argument(help="Model to prune without a recipe: folder, hub id, GGUF file or packaged model's name."),
    ] = None,
    recipe: options.OptionalRecipe = None,
    output: options.OptionalOutputFolder = None,
    remove: Annotated[str | None, typer.Option(help=f"{_SHORT}: kind of unit to remove [sublayers].")] = None,
    fraction: Annotated[float | None, typer.Option(help=f"{_SHORT}: fraction to remove, above 0, below 1.")] = None,
    of: Annotated[str | None, typer.Option(help=f"{_SHORT}: what the fraction is of [params].")] = None,
    method: Annotated[str | None, typer.Option(help=f"{_SHORT}: score or search that chooses [finercut].")] = None,
    set_: options.Set = None,
    formats: Annotated[
        str | None, typer.Option(help="Formats to write: safetensors,onnx or more, as `export.formats` in recipes.")
    ] = None,
    overwrite: options.Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and what it costs; write nothing.")] = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Prune a model: choose, cut, measure and export.

    By recipe: prunekit prune --recipe recipes/smollm2-demo.yaml --output out/demo

    Without: prunekit prune smollm2-135m-instruct --remove blocks --fraction 0.1 --method gardener -o out/small
    """
    short = {"remove": remove, "fraction": fraction, "of": of, "method": method}
    overrides = list(set_ or [])
    if formats is not None:
        overrides.append(f"export.formats=[{formats}]")
    if recipe is not None:
        _refuse_mixture(model, short)
        chosen = load_recipe(recipe, overrides)
    else:
        chosen = short_recipe(model, short, overrides)
    if output is None and not dry_run:
        raise UsageError(
            "`prunekit prune` needs a folder to write", hint="give --output DIR, or --dry-run to write nothing"
        )
    out = Output(json=json, quiet=quiet)
    if dry_run or output is None:
        from prunekit.cli.plan import show_plan

        show_plan(chosen, out)
    else:
        _run(chosen, output, overwrite, out)


def _refuse_mixture(model: str | None, short: dict[str, Any]) -> None:
    given = [f"--{name}" for name, value in short.items() if value is not None]
    if model is not None:
        given.insert(0, model)
    if given:
        raise UsageError(
            f"`{given[0]}` cannot be combined with `--recipe`",
            why="the recipe already says the model, what to remove and how to choose",
            hint="change a recipe's values with --set, for example --set steps.0.budget.remove=0.25",
        )


def short_recipe(model: str | None, short: dict[str, Any], overrides: list[str]) -> Recipe:
    """Recipe of the form without a file: one step, perplexity or embedding cosine left to `--set`.

    Args:
        model: source, or None where the user gave none.
        short: values of --remove, --fraction, --of and --method; None takes the default.
        overrides: `--set` expressions.
    Raises:
        UsageError: without a model or a fraction.
    """
    if model is None:
        raise UsageError(
            "nothing to prune", hint="give --recipe FILE, or a model with --fraction; see `prunekit recipes list`"
        )
    if model.endswith((".yaml", ".yml")):
        raise UsageError(f"`{model}` is a recipe, not a model", hint=f"give it as --recipe {model}")
    if short["fraction"] is None:
        raise UsageError(
            f"how much of `{model}` to remove is missing", hint="give --fraction, for example --fraction 0.2"
        )
    step = {
        "remove": short["remove"] or "sublayers",
        "by": by(short["method"] or "finercut"),
        "budget": {"remove": short["fraction"], "of": short["of"] or "params"},
    }
    return parse_recipe({"schema": 1, "model": {"source": model}, "steps": [step]}, overrides)


def by(method: str, knobs: dict[str, Any] | None = None) -> dict[str, Any]:
    """The `by:` entry of a recipe for a method's name: a search where one has that name, else a score."""
    from prunekit.core.registry import SCORES, SEARCHES

    if method in SEARCHES.names():
        return {"search": method, **(knobs or {})}
    SCORES.get(method)
    return {"score": method, **(knobs or {})}


def _run(recipe: Recipe, output: Path, overwrite: bool, out: Output) -> None:
    from rich.console import Group
    from rich.text import Text

    from prunekit import pipeline
    from prunekit.report.folder import REPORT
    from prunekit.report.layer_map import Row
    from prunekit.report.outcome import outcome

    with out.progress() as progress:
        result = pipeline.run(recipe, output, overwrite=overwrite, progress=progress, talk=out.talk)
    if result is None:
        return
    data = result.to_json()
    rows = [Row.from_json(row) for row in data["layer_map"]]
    shown = outcome(
        rows,
        data["before"],
        data["after"],
        data["loads"],
        data["expectations"],
        data.get("cut"),
        data.get("latency"),
    )
    out.result(Group(shown, "", Text(f"report: {output / REPORT}")), data)
    out.written(output)
    missed = [entry for entry in data["expectations"] if not entry["ok"]]
    if missed:
        names = ", ".join(f"`{entry['name']}: {entry['limit']}` got {entry['value']}" for entry in missed)
        raise ExpectationError(
            f"{len(missed)} of {len(data['expectations'])} expectations missed",
            why=names,
            hint="the folder is written all the same, and its card says so; change `expect` or the budget",
        )
