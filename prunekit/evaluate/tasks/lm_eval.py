"""Any task of EleutherAI's lm-evaluation-harness, by name or from a local YAML file."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import EvaluationError, UsageError
from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.subject import Subject


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LmEval:
    """A task of lm-evaluation-harness, measured by it on the loaded model; needs the extra `eval`.

    A task file is read as data: tags such as `!function` and `include` are refused. Its templates are run by the
    harness, so give only files that you trust.

    Args:
        data: name of a task that the harness knows, or a .yaml file with one task, whose `dataset_path: json` and
            `dataset_kwargs: {data_files: ...}` may name local rows.
        limit: rows; null takes all.
        num_fewshot: examples before each question; null takes the task's own number.
    """

    data: Annotated[str, Field(min_length=1, strict=True)]
    limit: Annotated[int, Field(ge=1, strict=True)] | None = None
    num_fewshot: Annotated[int, Field(ge=0, strict=True)] | None = None

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch",)
    limits: ClassVar[str] = "limit"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ()

    def load(self) -> dict[str, Any]:
        """The task's configuration, digests of the local files it names, and the harness's version."""
        from importlib.metadata import version

        if importlib.util.find_spec("lm_eval") is None:
            raise UsageError(
                "`lm_eval` needs lm-evaluation-harness", hint='pip install "prunekit[eval]", or use the other tasks'
            )
        if Path(self.data).suffix in (".yaml", ".yml"):
            config = _read(Path(self.data))
            return {"config": config, "files": dict(_files(config)), "lm_eval": version("lm_eval")}
        _require_known(self.data)
        return {"config": self.data, "lm_eval": version("lm_eval")}

    def prepare(self, data: dict[str, Any], subject: Subject) -> Any:
        """What the harness takes as a task."""
        return data["config"]

    def run(self, prepared: Any, subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """The harness's own figures; per-example values where its value is their mean."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        with progress.task("lm_eval", total=None, unit="rows"), _silent():
            try:
                model = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=subject.batch_size)
                found = simple_evaluate(
                    model=model,
                    tasks=[prepared],
                    limit=self.limit,
                    num_fewshot=self.num_fewshot,
                    bootstrap_iters=100,
                    log_samples=True,
                )
            except Exception as error:
                why = " ".join(str(error).split())[:400]
                raise EvaluationError(f"lm_eval failed on `{self.data}`", why=why) from error
        return _figures(found)


@contextmanager
def _silent() -> Iterator[None]:
    """Holds back what the harness prints and its bars."""
    from prunekit.modeling.quiet import quiet

    with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _read(file: Path) -> dict[str, Any]:
    from prunekit.core.yaml_lines import read_yaml

    if not file.is_file():
        raise UsageError(f"no task file `{file}`", hint="give a .yaml file, or a task's name")
    try:
        document = read_yaml(file.read_text("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"`{file}` cannot be read", why=str(error)) from error
    for problem in document.problems:
        raise UsageError(problem.what, why=problem.why, hint=problem.hint, at=f"{file}:{problem.line}")
    if not isinstance(document.data, dict) or not isinstance(document.data.get("task"), str):
        raise UsageError(f"`{file}` is no task file", why="it needs the key `task`, a name")
    if "include" in document.data:
        raise UsageError("`include` is not followed", hint="write the task out in one file", at=str(file))
    return document.data


def _files(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Digests of the local files that a task's data comes from.

    Raises:
        UsageError: if one is missing.
    """
    from prunekit.core.files import sha256_file

    kwargs = config.get("dataset_kwargs")
    named = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    for name in _texts(named):
        if "://" in name or "*" in name:
            continue
        if not Path(name).is_file():
            raise UsageError(f"no file `{name}`", why="`dataset_kwargs.data_files` names it")
        yield name, sha256_file(Path(name))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, Sequence):
        for entry in value:
            yield from _texts(entry)


def _require_known(name: str) -> None:
    from lm_eval.tasks import TaskManager

    with _silent():
        known = TaskManager().all_tasks
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else "`lm_eval ls tasks` lists all; a file ends in .yaml"
        raise UsageError(f"lm_eval knows no task `{name}`", hint=hint)


def _figures(found: Mapping[str, Any]) -> Mapping[str, Figure]:
    figures: dict[str, Figure] = {}
    results = found["results"]
    for task, values in results.items():
        samples = sorted(found.get("samples", {}).get(task, ()), key=lambda sample: sample["doc_id"])
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if metric.endswith("_stderr") or not filtered or isinstance(value, str | bool):
                continue
            name = metric if filtered == "none" else f"{metric}.{filtered}"
            better = "higher" if found.get("higher_is_better", {}).get(task, {}).get(metric, True) else "lower"
            label = name if len(results) == 1 else f"{task}.{name}"
            figures[label] = _figure(
                value, values.get(f"{metric}_stderr,{filtered}"), samples, metric, filtered, better
            )
    return figures


def _figure(value: Any, stderr: Any, samples: Sequence[Any], metric: str, filtered: str, better: Any) -> Figure:
    each = [sample.get(metric) for sample in samples if sample.get("filter", "none") == filtered]
    numbers = [float(entry) for entry in each if isinstance(entry, int | float)]
    if numbers and len(numbers) == len(each) and math.isclose(sum(numbers) / len(numbers), value, abs_tol=1e-9):
        return Figure.of("mean", numbers, better=better)
    return Figure(float(value), better, stderr=float(stderr) if isinstance(stderr, int | float) else None)
