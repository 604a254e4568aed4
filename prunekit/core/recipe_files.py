"""Where recipe files are: on disk, or among those that come with prunekit."""

from __future__ import annotations

from pathlib import Path

from prunekit.core.errors import RecipeError
from prunekit.core.recipe_problems import near


def shipped_folder() -> Path | None:
    """Folder of the recipes that come with prunekit: beside the package in a checkout, inside it where installed."""
    package = Path(__file__).resolve().parents[1]
    inside, beside = package / "recipes", package.parent / "recipes"
    if (package.parent / "pyproject.toml").is_file() and beside.is_dir():
        return beside
    return inside if inside.is_dir() else None


def shipped_recipes() -> dict[str, Path]:
    """Files of the recipes that come with prunekit, by name, sorted."""
    folder = shipped_folder()
    if folder is None:
        return {}
    found = {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}
    return dict(sorted(found.items()))


def recipe_path(name: str | Path) -> Path:
    """The file that a path or a shipped recipe's name stands for.

    Raises:
        RecipeError: if there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path.as_posix() in shipped:
        return shipped[path.as_posix()]
    if path.is_dir():
        raise RecipeError(f"`{name}` is a folder", hint="give a recipe file")
    hint = (
        near(path.with_suffix("").name, shipped) or "`prunekit recipes list` shows the recipes that come with prunekit"
    )
    raise RecipeError(f"no recipe `{name}`", why="there is no such file and no shipped recipe of this name", hint=hint)
