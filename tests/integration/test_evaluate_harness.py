"""Our scorer against lm-evaluation-harness: the same model, the same local rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prunekit.core.errors import UsageError
from prunekit.evaluate.run import check, measure
from prunekit.evaluate.specs import parse_task
from prunekit.evaluate.subject import Subject, open_subject

harness = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra `eval`)")

ROWS = 50


def write_task(folder: Path, rows: str, name: str, target: str) -> Path:
    """A local task over rows of a packaged set, choices without the space before them as the harness adds it."""
    from prunekit.evaluate.rows import read_rows

    data = folder / f"{name}.jsonl"
    lines = []
    for row in read_rows(rows, ROWS):
        fields = dict(row.fields)
        if "choices" in fields:
            fields["choices"] = [choice.removeprefix(" ") for choice in fields["choices"]]
        lines.append(json.dumps(fields))
    data.write_text("\n".join(lines), encoding="utf-8")
    task = folder / f"{name}.yaml"
    task.write_text(
        f"task: {name}\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\n"
        'doc_to_text: "{{context}}"\n' + target,
        encoding="utf-8",
    )
    return task


CHOICES = """\
output_type: multiple_choice
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: acc_norm, aggregation: mean, higher_is_better: true}]
"""
LAST_WORD = """\
output_type: loglikelihood
doc_to_target: "{{target}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true},
              {metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""


def figures(subject: Subject, *tasks: str) -> list[Any]:
    (work,) = check([(subject, [parse_task(text) for text in tasks])])
    return [measure(asked, prepared, subject).figures for asked, _, prepared in work.tasks]


@pytest.fixture(scope="module")
def smollm2(request: pytest.FixtureRequest) -> Subject:
    return open_subject("smollm2-135m-instruct", "cpu", "float32", 8)


@pytest.mark.slow
def test_multiple_choice_equals_the_harness(smollm2: Subject, tmp_path: Path) -> None:
    file = write_task(tmp_path, "arc_easy", "prunekit_arc_easy", CHOICES)
    ours, theirs = figures(smollm2, f"multiple_choice:arc_easy,limit={ROWS}", f"lm_eval:{file}")
    for name in ("acc", "acc_norm"):
        assert ours[name].examples == theirs[name].examples
        assert ours[name].value == theirs[name].value
    assert ours["acc"].stderr == pytest.approx(theirs["acc"].stderr)


@pytest.mark.slow
def test_last_word_equals_the_harness(smollm2: Subject, tmp_path: Path) -> None:
    file = write_task(tmp_path, "lambada", "prunekit_lambada", LAST_WORD)
    ours, theirs = figures(smollm2, f"cloze:lambada,limit={ROWS}", f"lm_eval:{file}")
    assert ours["acc"].examples == theirs["acc"].examples
    assert ours["perplexity"].value == pytest.approx(theirs["perplexity"].value, rel=1e-5)


@pytest.mark.slow
def test_log_likelihoods_equal_the_harness(smollm2: Subject) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from prunekit.evaluate.likelihood import likelihoods, split_request
    from prunekit.evaluate.rows import read_rows

    pairs = [(row.text("context"), choice) for row in read_rows("arc_easy", 10) for choice in row.texts("choices")]
    model = HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=8)
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    theirs = model.loglikelihood(asked, disable_tqdm=True)
    ours = likelihoods(smollm2.model, [split_request(smollm2.tokenizer, *pair) for pair in pairs], batch_size=5)
    for mine, (logprob, greedy) in zip(ours, theirs, strict=True):
        assert mine.logprob == pytest.approx(logprob, abs=1e-3)
        assert mine.greedy is bool(greedy)


def test_task_file_is_data(small: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("task: x\ndataset_path: json\nprocess_docs: !function utils.run\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        parse_task(f"lm_eval:{file}").task.load()
    assert caught.value.at == f"{file}:3"
    file.write_text("task: x\ninclude: other.yaml\n", encoding="utf-8")
    with pytest.raises(UsageError, match="include"):
        parse_task(f"lm_eval:{file}").task.load()
    file.write_text("task: x\ndataset_path: json\ndataset_kwargs: {data_files: no.jsonl}\n", encoding="utf-8")
    with pytest.raises(UsageError, match="no file"):
        parse_task(f"lm_eval:{file}").task.load()


def test_tiny_model_runs_a_local_task(small: Callable[[str], Path], tmp_path: Path) -> None:
    file = write_task(tmp_path, "arc_easy", "prunekit_tiny", CHOICES)
    subject = open_subject(str(small("llama")), "cpu", "float32", 8)
    # Rows of the packaged set are longer than the tiny model's positions, so the harness gets the first few alone.
    (found,) = figures(subject, f"lm_eval:{file},limit=4")
    assert len(found["acc"].examples[0]) == 4
    assert 0.0 <= found["acc"].value <= 1.0
