"""`prunekit recipes`: the shipped ones, and checks of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunekit.cli.main import main
from prunekit.core.recipe import load_recipe
from prunekit.core.recipe_files import shipped_recipes

STEP = "  - remove: blocks\n    by: {score: random}\n    budget: {remove: 0.2}\n"
SOUND = f"schema: 1\nmodel: {{source: m}}\nsteps:\n{STEP}"


@pytest.mark.parametrize("arguments", [["recipes"], ["recipes", "list"]])
def test_list_shows_every_shipped_recipe(arguments, capsys) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert shipped_recipes()
    for name in shipped_recipes():
        assert name in out


def test_list_as_json_names_model_and_file(capsys) -> None:
    assert main(["recipes", "list", "--json"]) == 0
    entries = {entry["recipe"]: entry for entry in json.loads(capsys.readouterr().out)}
    assert entries["smollm2-demo"]["model"] == "smollm2-135m-instruct"
    assert Path(entries["smollm2-demo"]["path"]).is_file()


def test_show_prints_the_file_itself(capsys) -> None:
    assert main(["recipes", "show", "smollm2-demo"]) == 0
    assert capsys.readouterr().out == shipped_recipes()["smollm2-demo"].read_text()


def test_show_effective_prints_a_recipe_that_reads_back(tmp_path: Path, capsys) -> None:
    assert main(["recipes", "show", "smollm2-demo", "--effective", "--set", "calibrate.seed=3"]) == 0
    (tmp_path / "again.yaml").write_text(capsys.readouterr().out)
    again = load_recipe(tmp_path / "again.yaml")
    assert again.calibrate.seed == 3
    assert again.effective() == load_recipe("smollm2-demo", ["calibrate.seed=3"]).effective()


def test_show_as_json_is_the_effective_recipe(capsys) -> None:
    assert main(["recipes", "show", "smollm2-demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == load_recipe("smollm2-demo").effective()


def test_every_shipped_recipe_is_sound(capsys) -> None:
    assert main(["recipes", "check", *shipped_recipes()]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: ok" for name in shipped_recipes()]


def test_check_names_all_problems_of_all_files(tmp_path: Path, capsys) -> None:
    for name, text in {"good": SOUND, "bad": SOUND + "modle: 1\n", "worse": SOUND + "heal: {}\nname: 3\n"}.items():
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("good", "bad", "worse", "missing")]
    assert main(["recipes", "check", *files]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("error: ") == 4
    assert f"{tmp_path}/worse:8, name" in err


def test_check_looks_at_overrides(tmp_path: Path, capsys) -> None:
    (tmp_path / "r.yaml").write_text(SOUND)
    assert main(["recipes", "check", str(tmp_path / "r.yaml"), "--set", "steps.0.budget.remove=3"]) == 2
    assert "at: --set steps.0.budget.remove=3" in capsys.readouterr().err


def test_schema_is_json_with_the_methods_there_are(capsys) -> None:
    assert main(["recipes", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "score_random" in schema["$defs"]
    assert "search_finercut" in schema["$defs"]
