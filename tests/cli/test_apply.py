"""`prunekit apply` on a real folder."""

from __future__ import annotations

import json

import pytest

from prunekit.cli.apply import apply
from prunekit.core.errors import PrunekitError
from prunekit.core.files import write_json


@pytest.fixture
def plan_file(tiny_llama, tmp_path):
    """Plan that drops block 1 of the tiny model."""
    from prunekit.plan.plan import Plan
    from prunekit.structure.view import ModelView

    view = ModelView.open(tiny_llama)
    path = tmp_path / "plan.json"
    write_json(path, Plan.make(view, drop=("blocks.1.attention", "blocks.1.ffn"), keep={}).to_json())
    return path


def test_cut_folder_is_written_and_named_last(invoke, plan_file, tiny_llama, tmp_path) -> None:
    done = invoke(apply, plan_file, "--model", tiny_llama, "--output", tmp_path / "o")
    assert done.exit_code == 0, done.exception
    assert done.stdout.splitlines()[-1] == str(tmp_path / "o")
    assert json.loads((tmp_path / "o" / "config.json").read_text())["num_hidden_layers"] == 3


def test_json_names_layout_and_costs(invoke, plan_file, tiny_llama, tmp_path) -> None:
    data = json.loads(invoke(apply, plan_file, "--model", tiny_llama, "--output", tmp_path / "o", "--json").stdout)
    assert data["layout"] == "stock"
    assert data["after"]["block_params"] * 4 == data["before"]["block_params"] * 3


def test_existing_folder_is_refused_and_kept(invoke, plan_file, tiny_llama, tmp_path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("x")
    done = invoke(apply, plan_file, "--model", tiny_llama, "--output", tmp_path / "o")
    assert isinstance(done.exception, PrunekitError)
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["mine"]


def test_file_that_is_no_plan_is_refused(invoke, tiny_llama, tmp_path) -> None:
    (tmp_path / "plan.json").write_text('{"drop": 3}')
    done = invoke(apply, tmp_path / "plan.json", "--model", tiny_llama, "--output", tmp_path / "o")
    assert isinstance(done.exception, PrunekitError)
    assert not (tmp_path / "o").exists()


def test_plan_of_another_tool_is_carried_out(invoke, tiny_llama, tmp_path) -> None:
    (tmp_path / "layers.txt").write_text("--prune-layers 1,3\n")
    done = invoke(apply, tmp_path / "layers.txt", "--model", tiny_llama, "--output", tmp_path / "o")
    assert done.exit_code == 0, done.exception
    assert json.loads((tmp_path / "o" / "config.json").read_text())["num_hidden_layers"] == 2
