"""Measures models by tasks: everything is checked first, finished tasks are reused, each result is kept at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunekit.core.errors import UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.evaluate.results import Measured, Results
from prunekit.evaluate.specs import Asked, require_distinct
from prunekit.evaluate.subject import KINDS, Subject
from prunekit.evaluate.task import digest

Talk = Callable[[str], None]


@dataclass(frozen=True)
class Evaluation:
    """What all tasks found on one model."""

    subject: Subject
    measured: tuple[Measured, ...]

    def to_json(self, examples: bool = True) -> dict[str, Any]:
        """Plain values.

        Args:
            examples: whether per-example values are in.
        """
        tasks = [entry.to_json() for entry in self.measured]
        if not examples:
            for task in tasks:
                task["figures"] = {
                    name: {key: value for key, value in figure.items() if key != "examples"}
                    for name, figure in task["figures"].items()
                }
        subject = self.subject
        return {
            "model": subject.name,
            "folder": str(subject.folder),
            "backend": subject.backend,
            "device": subject.device,
            "dtype": subject.dtype,
            **({"attention": dict(subject.attention)} if subject.attention is not None else {}),
            "tasks": tasks,
        }


@dataclass(frozen=True)
class Work:
    """Checked tasks of one model.

    Args:
        subject: the model.
        tasks: with the digest of their data and what the model will read.
    """

    subject: Subject
    tasks: tuple[tuple[Asked, str, Any], ...]


def check(pairs: Sequence[tuple[Subject, Sequence[Asked]]]) -> list[Work]:
    """Reads all data and fits it to every model; no model is loaded.

    Args:
        pairs: models, each with its tasks.
    Raises:
        UsageError: for the first task that a model cannot be measured by, or data that is missing or wrong.
    """
    loaded: dict[str, tuple[Any, str]] = {}
    work = []
    for subject, tasks in pairs:
        require_distinct(tasks)
        ready = []
        for asked in tasks:
            _require_fit(asked, subject)
            key = digest([asked.name, asked.options()])
            if key not in loaded:
                data = asked.task.load()
                loaded[key] = (data, digest(data))
            data, found = loaded[key]
            ready.append((asked, found, asked.task.prepare(data, subject)))
        work.append(Work(subject, tuple(ready)))
    return work


def _require_fit(asked: Asked, subject: Subject) -> None:
    if subject.kind not in asked.task.reads:
        wanted = " or ".join(KINDS[kind] for kind in KINDS if kind in asked.task.reads)
        hint = "similarity, probe and latency measure text encoders" if subject.kind == "sentences" else ""
        raise UsageError(f"`{asked.name}` needs {wanted}", why=f"`{subject.name}` is {KINDS[subject.kind]}", hint=hint)
    if subject.backend not in asked.task.backends:
        hint = "give the folder that it was exported from"
        raise UsageError(f"`{asked.name}` cannot measure an ONNX folder", hint=hint)
    if subject.kind != "images" and subject.tokenizer is None and asked.name not in ("latency", "memory"):
        hint = "put the tokenizer's files into the folder"
        raise UsageError(f"`{subject.name}` has no tokenizer", why=f"`{asked.name}` needs text as tokens", hint=hint)


def evaluate(
    work: Sequence[Work],
    fresh: bool = False,
    cache: Path | None = None,
    progress: Progress = NULL_PROGRESS,
    talk: Talk = lambda text: None,
) -> list[Evaluation]:
    """Measures, one model after the other; a model is loaded when a task is not finished yet, and let go afterwards.

    Args:
        work: from `check`.
        fresh: measure again what is finished.
        cache: where finished tasks are kept; None takes `$PRUNEKIT_CACHE` or `~/.cache/prunekit`.
        progress: bars.
        talk: told in a line what happens now.
    Raises:
        EvaluationError: where a measurement fails; those before it are kept.
    """
    done = []
    for part in work:
        results = Results.of(part.subject, cache, progress)
        measured = []
        for asked, data_digest, prepared in part.tasks:
            found = None if fresh else results.read(asked, data_digest)
            if found is None:
                talk(f"{part.subject.name}: measuring {asked.label}")
                found = measure(asked, prepared, part.subject, progress)
                results.write(found, data_digest)
            else:
                talk(f"{part.subject.name}: {asked.label} was measured before; --fresh measures again")
            measured.append(found)
        part.subject.release()
        done.append(Evaluation(part.subject, tuple(measured)))
    return done


def measure(asked: Asked, prepared: Any, subject: Subject, progress: Progress = NULL_PROGRESS) -> Measured:
    """One task on one model; nothing is reused or kept.

    Args:
        asked: the task.
        prepared: what its `prepare` gave for this model.
        subject: the model.
        progress: bars.
    """
    start = time.perf_counter()
    figures: Mapping[str, Any] = asked.task.run(prepared, subject, progress)
    return Measured(asked, figures, time.perf_counter() - start)
