"""Options that several verbs share, so that they read alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_RECIPE = typer.Option("--recipe", "-r", help="Recipe file, or the name of a recipe that comes with prunekit.")
_OUTPUT = typer.Option("--output", "-o", help="Folder to write.", file_okay=False)

Recipe = Annotated[Path, _RECIPE]
OptionalRecipe = Annotated[Path | None, _RECIPE]
OutputFolder = Annotated[Path, _OUTPUT]
OptionalOutputFolder = Annotated[Path | None, _OUTPUT]
Model = Annotated[str, typer.Argument(help="Folder, hub id, GGUF file or packaged model's name.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value of the recipe: steps.0.budget.remove=0.25; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would happen; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document; errors too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No talk and no progress on stderr.")]
