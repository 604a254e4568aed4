"""`prunekit prune`: which recipe it builds, what it prints, how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunekit.cli.prune import by, prune
from prunekit.core.errors import ExpectationError, UsageError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, result: SimpleNamespace) -> list[tuple[Any, Path, dict[str, Any]]]:
    """Calls of the pipeline, which answers at once."""
    seen: list[tuple[Any, Path, dict[str, Any]]] = []

    def run(recipe: Any, output: Path, **options: Any) -> SimpleNamespace:
        seen.append((recipe, output, options))
        options["talk"]("some talk")
        return result

    monkeypatch.setattr("prunekit.pipeline.run", run)
    return seen


def test_result_is_on_stdout_and_ends_with_the_path(invoke, calls, recipe_file, tmp_path) -> None:
    done = invoke(prune, "--recipe", recipe_file, "--output", tmp_path / "o")
    assert done.exit_code == 0, done.exception
    lines = done.stdout.splitlines()
    assert lines[-1] == str(tmp_path / "o")
    assert "some talk" not in done.stdout
    assert "some talk" in done.stderr
    assert any(line.split() == ["parameters", "M", "40.0", "30.0", "-25.0"] for line in lines)
    assert "the [dense] model" in done.stdout


def test_json_is_one_document(invoke, calls, recipe_file, tmp_path) -> None:
    done = invoke(prune, "--recipe", recipe_file, "--output", tmp_path / "o", "--json")
    assert json.loads(done.stdout)["after"]["perplexity"] == 25.0


def test_quiet_says_nothing_but_the_result(invoke, calls, recipe_file, tmp_path) -> None:
    done = invoke(prune, "--recipe", recipe_file, "--output", tmp_path / "o", "--quiet")
    assert done.stderr == ""


def test_missed_expectation_shows_the_result_then_fails(invoke, calls, recipe_file, tmp_path, result) -> None:
    result.data["expectations"] = [{"name": "perplexity_max", "limit": 22.0, "value": 25.0, "ok": False}]
    done = invoke(prune, "--recipe", recipe_file, "--output", tmp_path / "o")
    assert isinstance(done.exception, ExpectationError)
    assert done.exception.exit_code == 3
    assert "perplexity_max" in done.exception.why
    assert "missed" in done.stdout


def test_overwrite_reaches_the_pipeline(invoke, calls, recipe_file, tmp_path) -> None:
    invoke(prune, "--recipe", recipe_file, "--output", tmp_path / "o")
    invoke(prune, "--recipe", recipe_file, "--output", tmp_path / "o", "--overwrite")
    assert [options["overwrite"] for _, _, options in calls] == [False, True]


def test_without_output_nothing_runs(invoke, calls, recipe_file) -> None:
    done = invoke(prune, "--recipe", recipe_file)
    assert isinstance(done.exception, UsageError)
    assert "--dry-run" in done.exception.hint
    assert calls == []


@pytest.mark.parametrize("extra", [["some-model"], ["--fraction", "0.2"], ["--method", "random"]])
def test_recipe_and_short_form_do_not_mix(invoke, calls, recipe_file, tmp_path, extra) -> None:
    done = invoke(prune, *extra, "--recipe", recipe_file, "--output", tmp_path / "o")
    assert isinstance(done.exception, UsageError)
    assert extra[0] in str(done.exception)
    assert calls == []


@pytest.mark.parametrize("given", [[], ["model"], ["--fraction", "0.2"]])
def test_short_form_needs_model_and_fraction(invoke, calls, tmp_path, given) -> None:
    done = invoke(prune, *given, "--output", tmp_path / "o")
    assert isinstance(done.exception, UsageError)
    assert calls == []


def test_a_recipe_in_the_place_of_the_model_is_told_where_it_goes(invoke, calls, tmp_path) -> None:
    done = invoke(prune, "mine.yaml", "--output", tmp_path / "o")
    assert isinstance(done.exception, UsageError)
    assert done.exception.hint == "give it as --recipe mine.yaml"
    assert calls == []


def test_short_form_runs_the_recipe_it_stands_for(invoke, calls, tmp_path) -> None:
    done = invoke(prune, "m", "--remove", "blocks", "--fraction", "0.1", "--method", "gardener", "-o", tmp_path / "o")
    assert done.exit_code == 0, done.exception
    (step,) = calls[0][0].steps
    assert step.remove == "blocks"
    assert step.by.score == "gardener"
    assert step.budget.remove == 0.1


def test_formats_and_set_change_the_recipe(invoke, calls, recipe_file, tmp_path) -> None:
    overrides = ["--formats", "safetensors,onnx", "--set", "steps.0.budget.remove=0.25"]
    done = invoke(prune, "--recipe", recipe_file, "-o", tmp_path / "o", *overrides)
    assert done.exit_code == 0, done.exception
    recipe = calls[0][0]
    assert list(recipe.export.formats) == ["safetensors", "onnx"]
    assert recipe.steps[0].budget.remove == 0.25


def test_dry_run_writes_nothing(invoke, calls, recipe_file, tmp_path, monkeypatch) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("prunekit.cli.plan.show_plan", lambda recipe, out: shown.append(recipe))
    before = sorted(tmp_path.rglob("*"))
    done = invoke(prune, "--recipe", recipe_file, "--output", tmp_path / "o", "--dry-run")
    assert done.exit_code == 0, done.exception
    assert len(shown) == 1
    assert calls == []
    assert sorted(tmp_path.rglob("*")) == before


def test_method_name_becomes_search_or_score() -> None:
    assert by("finercut", {"distance": "js"}) == {"search": "finercut", "distance": "js"}
    assert by("random") == {"score": "random"}
    with pytest.raises(UsageError):
        by("gardner")
