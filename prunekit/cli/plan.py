"""`prunekit plan`: what a recipe or a plan would remove, what that costs, and where the result would load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import UsageError
from prunekit.core.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from prunekit.core.types import Order, Scores
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView

_FORMATS = "prunekit, mergekit, llama_quantize, llm_drop, block_configs or per_layer_config"


def plan(
    recipe: options.OptionalRecipe = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Show or convert this plan instead, of any format of --to.", exists=True, dir_okay=False
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="With --from: the model that the plan is for.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the plan to this file.", dir_okay=False)
    ] = None,
    to: Annotated[str, typer.Option("--to", help=f"Format to write: {_FORMATS}.")] = "prunekit",
    set_: options.Set = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show what a recipe would remove and predict parameters, FLOPs, KV bytes and where the result loads.

    No weights are written. `prunekit apply` carries out the file that --output writes.

    By recipe: prunekit plan --recipe my.yaml --output plan.json

    From another tool: prunekit plan --from slices.yaml --model path/to/model --to llm_drop --output lists.json
    """
    out = Output(json=json, quiet=quiet)
    _check(recipe, from_, model, set_, output, to)
    if from_ is not None and model is not None:
        show_file(from_, model, out, output, overwrite, to)
    elif recipe is not None:
        show_plan(load_recipe(recipe, list(set_ or [])), out, output, overwrite, to)


def _check(
    recipe: Path | None,
    file: Path | None,
    model: str | None,
    set_: list[str] | None,
    output: Path | None,
    to: str,
) -> None:
    if (recipe is None) == (file is None):
        raise UsageError(
            "`prunekit plan` needs a recipe or a plan", hint="give --recipe FILE, or --from FILE --model M"
        )
    if file is not None and (model is None or set_):
        raise UsageError(
            "`--from` needs the model that the plan is for, and no `--set`", hint="give --model; `--set` is for recipes"
        )
    if file is None and model is not None:
        raise UsageError("`--model` goes with `--from`", hint="change a recipe's model with --set model.source=...")
    if to != "prunekit" and output is None:
        raise UsageError(f"`--to {to}` needs a file to write", hint="give --output FILE")


def show_plan(
    recipe: Recipe, out: Output, file: Path | None = None, overwrite: bool = False, to: str = "prunekit"
) -> None:
    """Makes the plan of a recipe, prints it, and writes it where a file is given.

    Args:
        recipe: what to remove from which model.
        out: where to print.
        file: plan file to write.
        overwrite: allow an existing plan file.
        to: format of the file.
    """
    from prunekit import pipeline
    from prunekit.cli._files import require_free

    if file is not None:
        require_free(file, overwrite)
    if recipe.learn is not None:
        out.talk("a plan holds cuts alone: what `learn` folds into weights comes with `prunekit prune`")
    later = [name for name in ("repair", "heal") if getattr(recipe, name) is not None]
    if later:
        out.talk(f"a plan holds cuts alone: {' and '.join(f'`{n}`' for n in later)} come with `prunekit prune`")
    runtime = recipe.effective().get("runtime")
    if runtime is not None:
        asked = runtime["attention"]
        options = ", ".join(f"{key} {value}" for key, value in asked.items() if key != "pattern")
        out.talk(f"the result reads by the pattern `{asked['pattern']}` ({options or 'no options'})")
    with out.progress() as progress:
        made = pipeline.make_plan(recipe, progress=progress, talk=out.talk)
    figures = asdict(made.before), asdict(made.after)
    _show(out, made.view, made.plan, made.layout, *figures, made.orders, made.latency, runtime)
    _write(out, made.view, made.plan, file, to, recipe.model.source)


def show_file(source: Path, model: str, out: Output, file: Path | None, overwrite: bool, to: str) -> None:
    """Prints the plan in a file of any format, and writes it in another where a file is given."""
    from prunekit.checkpoint.sources import resolve
    from prunekit.cli._files import require_free
    from prunekit.plan.cost import cost
    from prunekit.plan.interchange import read_plan
    from prunekit.plan.layout import choose_layout
    from prunekit.structure.view import ModelView

    if file is not None:
        require_free(file, overwrite)
    with out.progress() as progress:
        view = ModelView.open(resolve(model, progress=progress).folder)
    cuts = read_plan(source, view)
    layout = choose_layout(view, cuts)
    _show(out, view, cuts, layout, asdict(cost(view)), asdict(cost(view, cuts)), ())
    _write(out, view, cuts, file, to, model)


def _show(
    out: Output,
    view: ModelView,
    cuts: Plan,
    layout: Any,
    before: dict[str, Any],
    after: dict[str, Any],
    orders: Sequence[Scores | Order],
    latency: Mapping[str, Any] | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> None:
    from prunekit.plan.loads import loads
    from prunekit.report.layer_map import layer_map
    from prunekit.report.outcome import outcome

    rows, where = layer_map(view, cuts), loads(view, cuts, layout)
    data: dict[str, Any] = {
        "plan": cuts.to_json(),
        "layout": layout.kind,
        "before": before,
        "after": after,
        "loads": where,
        "layer_map": [row.to_json() for row in rows],
        "orders": [order.to_json() for order in orders],
        **({"latency": dict(latency)} if latency else {}),
        **({"runtime": dict(runtime)} if runtime else {}),
    }
    out.result(outcome(rows, before, after, where, latency=latency), data)


def _write(out: Output, view: ModelView, cuts: Plan, file: Path | None, to: str, model: str) -> None:
    from prunekit.core.files import write_text
    from prunekit.core.ranks import is_first_rank
    from prunekit.plan.interchange import plan_text
    from prunekit.plan.layer_formats import decilm_notes

    if file is None or not is_first_rank():
        return
    write_text(file, plan_text(view, cuts, to, model))
    if to == "block_configs":
        for runtime, note in decilm_notes(view, cuts).items():
            out.talk(f"a checkpoint with these block_configs in {runtime}: {note}")
    out.written(file)
