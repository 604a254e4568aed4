"""`prunekit export`: a checkpoint folder in another format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import UsageError


def export(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder, pruned or not.", exists=True, file_okay=False)],
    format: Annotated[
        Literal["onnx", "gguf", "deci", "genai", "masked"], typer.Option("--format", help="Format to write.")
    ] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write [FOLDER/FORMAT].", file_okay=False)
    ] = None,
    type: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0"],
        typer.Option("--type", help="gguf: type of matrices; auto is that of the checkpoint."),
    ] = "auto",
    source: Annotated[
        str | None, typer.Option("--source", help="masked: the model that was cut [the manifest's].")
    ] = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a checkpoint in another format.

    onnx: a graph for ONNX Runtime, compared with torch before it counts as written. genai: the same with the
    configuration that onnxruntime-genai opens. gguf: a file for llama.cpp, tokenizer and chat template included.
    deci: DeciLM block_configs for vLLM, Llama-shaped models only. masked: original shapes with zeros, which saves
    nothing, for A/B checks.
    """
    from prunekit.core.files import atomic_folder
    from prunekit.export.targets import TARGETS, Options
    from prunekit.report.facts import facts_table

    for given, name, only in ((type != "auto", "--type", "gguf"), (source is not None, "--source", "masked")):
        if given and format != only:
            raise UsageError(f"`{name}` is for `--format {only}`, not `{format}`")
    out = Output(json=json, quiet=quiet)
    target = output if output is not None else folder / format
    with out.progress() as progress, atomic_folder(target, overwrite) as unfinished:
        report = TARGETS[format].write(folder, unfinished, Options(type, source), progress)
    data = {"output": str(target), "format": format, **report.to_json()}
    out.result(facts_table(data), data)
    out.written(target)
