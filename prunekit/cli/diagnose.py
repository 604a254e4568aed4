"""`prunekit diagnose`: what the parts of a model do, measured on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import UsageError

_SUFFIXES = (".png", ".svg")


def diagnose(
    model: options.Model,
    only: Annotated[
        list[str] | None, typer.Option(help="Diagnostic to run, such as head_roles [all]; may be repeated.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Text, or `noise` or a .safetensors file for images [wikitext2, or noise].")
    ] = None,
    sequences: Annotated[int, typer.Option(help="How many sequences.", min=1)] = 2,
    length: Annotated[int, typer.Option(help="Tokens in each sequence.", min=2)] = 128,
    seed: Annotated[int, typer.Option(help="0 takes the start of the text; above 0 draws where.", min=0)] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw it into this file, .png or .svg.", dir_okay=False)] = None,
    revision: options.Revision = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure what the parts of a model do: attention rank and entropy, roles of heads, activations, sensitivity.

    For example: prunekit diagnose smollm2-135m-instruct --plot smollm2.png
    """
    from prunekit.cli._files import require_free
    from prunekit.pipeline.diagnose import diagnose as measure
    from prunekit.report.diagnosis import diagnosis_table, write_diagnosis

    if plot is not None:
        if plot.suffix not in _SUFFIXES:
            raise UsageError(f"`--plot {plot}` is no picture that can be drawn", hint=f"use {' or '.join(_SUFFIXES)}")
        require_free(plot, overwrite)
    out = Output(json=json, quiet=quiet)
    calibrate: dict[str, Any] = {"sequences": sequences, "length_tokens": length, "seed": seed}
    if data is not None:
        calibrate["data"] = data
    section = {"source": model, **({} if revision is None else {"revision": revision})}
    with out.progress() as progress:
        panels = measure(section, calibrate, only or (), progress, out.talk)
    out.result(
        diagnosis_table(panels),
        {"model": model, "calibrate": calibrate, "panels": [panel.to_json() for panel in panels]},
    )
    if plot is not None:
        write_diagnosis(panels, plot, f"{model}, {sequences} sequences of {length} tokens")
        out.written(plot)
