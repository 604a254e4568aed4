"""`prunekit evaluate`: what models can do, measured by tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.run import Work
    from prunekit.evaluate.specs import Asked
    from prunekit.evaluate.subject import Subject


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help=f"{options.MODEL_HELP[:-1]}, or a folder with model.onnx.")
    ],
    task: options.Tasks = None,
    suite: options.Suite = None,
    limit: options.Limit = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = None,
    attention: options.Attention = None,
    strict: options.Strict = False,
    fresh: options.Fresh = False,
    output: options.OutputFile = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure models: perplexity, multiple choice, generative canaries, vectors, speed, memory.

    For example: prunekit evaluate out/small --suite quick

    Or by task: prunekit evaluate out/small --task perplexity:my.txt,stride_tokens=256 --task arithmetic

    Finished tasks are kept by the content of model, data and options, and reused; a run that was ended goes on. Tasks
    and their options: docs/reference/tasks.md.
    """
    from prunekit.cli._files import require_free

    if output is not None:
        require_free(output, overwrite)
    out = Output(json=json, quiet=quiet)
    named = named_tasks(task, limit)
    with out.progress() as progress:
        subjects = open_subjects(models, device, dtype, batch_size, progress)
        set_attention(subjects, attention, strict)
        work = checked(subjects, named, suite, limit)
        evaluations = _measured(work, fresh, progress, out)
    from prunekit.report.evaluation import figures_table

    data = {"models": [evaluation.to_json(examples=False) for evaluation in evaluations]}
    out.result(figures_table(data["models"]), data)
    if output is not None:
        write_result(output, {"models": [evaluation.to_json() for evaluation in evaluations]}, out)


def open_subjects(
    models: Sequence[str], device: str, dtype: str | None, batch_size: int | None, progress: Progress
) -> list[Subject]:
    """Every model, headers read and names told apart; no weight is loaded.

    Raises:
        PrunekitError: for the first model, device or number that is wrong.
    """
    from prunekit.evaluate.compare import names
    from prunekit.evaluate.subject import open_subject, rows_at_once
    from prunekit.pipeline.inputs import device_named

    if batch_size is not None and batch_size < 1:
        raise UsageError(f"`--batch-size {batch_size}` must be at least 1")
    where = device_named(device)
    rows = batch_size or rows_at_once(where)
    subjects = [open_subject(model, where, dtype, rows, progress, device == "auto") for model in models]
    for subject, name in zip(subjects, names(models, [subject.name for subject in subjects]), strict=True):
        subject.name = name
    return subjects


def set_attention(subjects: Sequence[Subject], attention: str | None, strict: bool = False) -> None:
    """Puts models under the sparse runtime, as typed behind `--attention`; else they keep what their folder says.

    Args:
        subjects: the models.
        attention: pattern with options, None for none.
        strict: whether a pattern without a kernel for it is an error.
    Raises:
        UsageError: for an unknown pattern or option, or a model that it is not for.
    """
    for subject in subjects:
        subject.strict = strict
    if attention is None:
        return
    from prunekit.core.task_options import option_values, parts
    from prunekit.runtime.attention.policy import policy

    name, *rest = parts(attention)
    at = f"--attention {attention}"
    section = policy({"pattern": name, **option_values(rest, at)}).section()
    for subject in subjects:
        if subject.kind != "text" or subject.backend != "torch":
            why = "the sparse runtime is for models that write text, in torch"
            raise UsageError(f"`{subject.name}` cannot run under `{name}`", why=why, at=at)
        subject.attention = section


def named_tasks(task: Sequence[str] | None, limit: int | None) -> list[Asked]:
    """Tasks as typed behind `--task`, before any model is looked for.

    Raises:
        UsageError: for the first that is wrong.
    """
    from prunekit.evaluate.specs import parse_task

    return [parse_task(text, limit) for text in task or ()]


def checked(
    subjects: Sequence[Subject],
    named: Sequence[Asked],
    suite: str | None,
    limit: int | None,
    alike: bool = False,
) -> list[Work]:
    """Tasks of every model with their data; the quick suite where neither tasks nor a suite are named.

    Args:
        subjects: the models.
        named: from `named_tasks`.
        suite: as typed behind `--suite`.
        limit: most examples of each task.
        alike: give all models the suite that fits the one that reads least.
    Raises:
        UsageError: for what cannot be measured, before any model is loaded.
    """
    from prunekit.evaluate.run import check
    from prunekit.evaluate.specs import suite as tasks_of

    chosen = suite or (None if named else "quick")
    known = [subject.positions for subject in subjects if subject.positions is not None]
    least = min(known, default=None)
    pairs = []
    for subject in subjects:
        of_suite = []
        if chosen is not None:
            of_suite = tasks_of(chosen, subject.kind, least if alike else subject.positions, limit)
            if subject.backend == "onnx":
                of_suite = [made for made in of_suite if "onnx" in made.task.backends]
        pairs.append((subject, [*of_suite, *named]))
    return check(pairs)


def _measured(work: Sequence[Work], fresh: bool, progress: Progress, out: Output) -> Any:
    from prunekit.evaluate.run import evaluate as run

    return run(work, fresh, progress=progress, talk=out.talk)


def write_result(output: Path, data: Any, out: Output) -> None:
    """The whole result with per-example values as JSON, and the path as the last line."""
    from prunekit.cli._output import finite
    from prunekit.core.files import write_json

    write_json(output, finite(data))
    out.written(output)
