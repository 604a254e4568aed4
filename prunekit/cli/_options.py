"""Options that several verbs share, so that they read alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

_RECIPE = typer.Option("--recipe", "-r", help="Recipe file, or the name of a recipe that comes with prunekit.")
_OUTPUT = typer.Option("--output", "-o", help="Folder to write.", file_okay=False)

Recipe = Annotated[Path, _RECIPE]
OptionalRecipe = Annotated[Path | None, _RECIPE]
OutputFolder = Annotated[Path, _OUTPUT]
OptionalOutputFolder = Annotated[Path | None, _OUTPUT]
MODEL_HELP = "Folder, hub id, GGUF file or packaged model's name."
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub model.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a value of the recipe: steps.0.budget.remove=0.25; may be repeated."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would happen; write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document; errors too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No talk and no progress on stderr.")]
Tasks = Annotated[
    list[str] | None,
    typer.Option("--task", help="What to measure: NAME, NAME:DATA or NAME:DATA,option=value; may be repeated."),
]
Suite = Annotated[str | None, typer.Option("--suite", help="quick or full; quick where no task is named.")]
Limit = Annotated[int | None, typer.Option("--limit", help="Most examples of each task.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, mps, cuda or cuda:1.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Type to compute in [float32 on a CPU, else as the weights]."),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Rows run at once [8 on a CPU, else 32].")]
Attention = Annotated[
    str | None,
    typer.Option(
        help="Run under the sparse runtime: a pattern, with options such as power,window_blocks=8 or layers=[2, 3]; "
        "else a folder runs under the pattern that its configuration names."
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Fail where a pattern runs in plain torch for want of a kernel.")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="Measure again what is finished.")]
OutputFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="JSON file to write, with per-example values.", dir_okay=False)
]
