"""`prunekit recipes`: the recipes that come with prunekit, and checks of any recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import RecipeError

app = typer.Typer(rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """List, show and check recipes; print the schema for editors."""
    if context.invoked_subcommand is None:
        show_list(Output())


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the recipes that come with prunekit."""
    show_list(Output(json=json))


def show_list(out: Output) -> None:
    """Prints the shipped recipes, one a line."""
    from rich.table import Table

    from prunekit.core.recipe_files import shipped_recipes

    data = [_entry(name, path) for name, path in shipped_recipes().items()]
    table = Table("recipe", "model", "what it does", box=None, pad_edge=False, header_style="bold")
    for entry in data:
        table.add_row(entry["recipe"], entry["model"], entry["description"])
    out.result(table if data else "no recipes found", data)


def _entry(name: str, path: Path) -> dict[str, Any]:
    """What the list says about a recipe; read without checking it, which would import its methods."""
    from prunekit.core.yaml_lines import read_yaml

    data = read_yaml(path.read_text(encoding="utf-8")).data
    data = data if isinstance(data, dict) else {}
    model = data.get("model")
    source = model.get("source", "") if isinstance(model, dict) else ""
    return {"recipe": name, "model": str(source), "description": str(data.get("description", "")), "path": str(path)}


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of one that comes with prunekit.")],
    effective: Annotated[bool, typer.Option("--effective", help="With every default written out.")] = False,
    set_: options.Set = None,
    json: options.Json = False,
) -> None:
    """Print a recipe; --effective writes out every default."""
    from prunekit.core.recipe import load_recipe
    from prunekit.core.recipe_files import recipe_path

    if not (effective or set_ or json):
        sys.stdout.write(recipe_path(recipe).read_text(encoding="utf-8"))
        return
    data = load_recipe(recipe, list(set_ or [])).effective()
    Output(json=json).result(_yaml(data), data)


def _yaml(data: Any) -> str:
    import yaml

    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110).rstrip()


@app.command()
def check(
    recipes: Annotated[list[str], typer.Argument(help="Recipe files or names.", metavar="RECIPE...")],
    set_: options.Set = None,
    json: options.Json = False,
) -> None:
    """Check recipes without touching a model.

    Keys, types, ranges, combinations, methods and their knobs. Exit code 2 with all problems of all files where one
    is not sound.
    """
    from prunekit.core.recipe import InvalidRecipeError, Problem, load_recipe

    problems: list[Problem] = []
    sound: list[str] = []
    for name in recipes:
        try:
            load_recipe(name, list(set_ or []))
            sound.append(name)
        except InvalidRecipeError as error:
            problems += error.problems
        except RecipeError as error:
            problems.append(Problem(error.what, (), error.why, error.hint, error.at))
    if problems:
        raise InvalidRecipeError(problems, ", ".join(name for name in recipes if name not in sound))
    Output(json=json).result("\n".join(f"{name}: ok" for name in sound), [{"recipe": n, "ok": True} for n in sound])


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors that complete."""
    from prunekit.core.recipe_schema import json_schema

    Output(json=True).result("", json_schema())
