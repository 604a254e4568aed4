"""`prunekit compare`: models side by side, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli import _options as options
from prunekit.cli._output import Output
from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from prunekit.evaluate.subject import Subject


def compare(
    models: Annotated[
        list[str], typer.Argument(metavar="A B [C...]", help="Models as for evaluate; all are compared with the first.")
    ],
    task: options.Tasks = None,
    suite: options.Suite = None,
    limit: options.Limit = None,
    kl: Annotated[bool, typer.Option("--kl/--no-kl", help="Compare next-token distributions on a text.")] = True,
    text: Annotated[str, typer.Option(help="Text for that: a packaged name, .txt, .jsonl or data set.")] = (
        "wikitext2_eval"
    ),
    windows: Annotated[int, typer.Option(help="Windows of that text.")] = 8,
    length_tokens: Annotated[int, typer.Option(help="Tokens in each window.")] = 256,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    batch_size: options.BatchSize = None,
    attention: Annotated[
        str | None,
        typer.Option(help="Run all models but the first under the sparse runtime: a pattern, with options."),
    ] = None,
    strict: options.Strict = False,
    fresh: options.Fresh = False,
    output: options.OutputFile = None,
    overwrite: options.Overwrite = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare models on the same tasks: differences with paired intervals, and KL by token with the worst passages.

    For example: prunekit compare smollm2-135m-instruct out/small --suite quick

    The first model is the one that the others are compared with, usually the dense one.
    """
    from prunekit.cli._files import require_free
    from prunekit.cli.evaluate import checked, named_tasks, open_subjects, set_attention, write_result
    from prunekit.evaluate.compare import Comparison
    from prunekit.evaluate.run import evaluate as run
    from prunekit.report.evaluation import comparison

    if len(models) < 2:
        raise UsageError("nothing to compare with", hint="give two models or more; `prunekit evaluate` takes one")
    if output is not None:
        require_free(output, overwrite)
    out = Output(json=json, quiet=quiet)
    named = named_tasks(task, limit)
    with out.progress() as progress:
        subjects = open_subjects(models, device, dtype, batch_size, progress)
        _require_alike(subjects)
        set_attention(subjects[:1], None, strict)
        set_attention(subjects[1:], attention, strict)
        work = checked(subjects, named, suite, limit, alike=True)
        asked = _kl_windows(subjects, text, windows, length_tokens) if kl else None
        evaluations = run(work, fresh, progress=progress, talk=out.talk)
        divergences = _divergences(subjects, asked, text, progress)
    done = Comparison(tuple(evaluations), tuple(divergences))
    data = done.to_json()
    out.result(comparison(data), data)
    if output is not None:
        write_result(output, done.to_json(examples=True), out)


def _require_alike(subjects: Sequence[Subject]) -> None:
    from prunekit.evaluate.subject import KINDS

    first = subjects[0]
    for other in subjects[1:]:
        if other.kind != first.kind:
            why = f"`{first.name}` is {KINDS[first.kind]}, `{other.name}` is {KINDS[other.kind]}"
            raise UsageError("models of different kinds cannot be compared", why=why)


def _kl_windows(subjects: Sequence[Subject], text: str, windows: int, length_tokens: int) -> Any:
    """Windows int64 [n, tokens]; None for models that write no text."""
    from prunekit.calibrate.batches import token_batch
    from prunekit.calibrate.texts import load_text
    from prunekit.evaluate.divergence import require_same_tokens

    first, *others = subjects
    if first.kind != "text":
        return None
    if windows < 1 or length_tokens < 2:
        raise UsageError("KL needs a window of at least 2 tokens", hint="raise --windows or --length-tokens")
    read = load_text(text)
    for subject in subjects:
        subject.require_positions(length_tokens, f"a window of `{text}`", hint="lower --length-tokens, or give --no-kl")
    for other in others:
        require_same_tokens(first, other, read)
    return token_batch(first.tokenizer, text, windows, length_tokens)


def _divergences(subjects: Sequence[Subject], ids: Any, text: str, progress: Any) -> list[Any]:
    """KL of the first model to every other; two models are in memory at a time."""
    from prunekit.evaluate.divergence import divergence

    first, *others = subjects
    if ids is None:
        return [None for _ in others]
    found = []
    for other in others:
        found.append(divergence(first, other, ids, text, progress=progress))
        other.release()
    first.release()
    return found
