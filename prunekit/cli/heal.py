"""`prunekit heal`: a folder that was cut earlier, trained against the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output


def heal(
    folder: Annotated[
        Path, typer.Argument(help="Checkpoint folder that was cut earlier.", exists=True, file_okay=False)
    ],
    output: options.OutputFolder,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Dense model: folder, hub id, GGUF file or packaged name [the one the folder's manifest names]."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="What is trained for; `prunekit methods list` shows them.")] = "distill",
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text to learn from [wikitext2], `teacher` for text it writes; may be repeated."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps at most [200].")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop training after so long.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak of the learning rate [1e-4].")] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="Train adapters of low rank and merge them; needs peft.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any value below `heal` in a recipe: heal.temperature=2; may be repeated."),
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train what a cut left: distillation or fine-tuning.

    The folder is only read. A killed run goes on where it was when the same command is given again.

    Several devices: torchrun --nproc-per-node 4 -m prunekit heal out/cut --output out/healed
    """
    from rich.console import Group
    from rich.text import Text

    from prunekit import pipeline
    from prunekit.report.table import before_after, lines

    given = {"steps": steps, "minutes": minutes, "lr": lr, "train": "lora" if lora else None}
    asked: dict[str, Any] = {"method": method, **{key: value for key, value in given.items() if value is not None}}
    if data:
        asked["data"] = list(data)
    out = Output(json=json, quiet=quiet)
    recipe = pipeline.heal_recipe(folder, teacher, asked, set_ or [])
    with out.progress() as progress:
        result = pipeline.heal_folder(folder, recipe, output, overwrite, progress, out.talk)
    if result is None:
        return
    shown = [before_after(lines(result.before, result.after, result.cut))] if result.after else []
    told = result.heal
    watched = "held_out_before" in told
    loss = f", held-out loss {told['held_out_before']:.4f} -> {told['held_out_after']:.4f}" if watched else ""
    done = f"{told['steps_done']} steps, {told['tokens']:,} tokens, stopped by {told['stopped_by']}{loss}"
    out.result(Group(*shown, Text(done)), result.to_json())
    out.written(output)
