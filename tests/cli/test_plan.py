"""`prunekit plan`: prints and writes a plan, no weights."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml

from prunekit.cli.plan import plan
from prunekit.core.errors import UsageError
from prunekit.core.types import Order, OrderStep


class StandInPlan:
    """Drops block 1."""

    drop = ("blocks.1.attention", "blocks.1.ffn")
    keep: ClassVar[dict[str, tuple[int, ...]]] = {}

    def to_json(self) -> dict[str, Any]:
        return {"drop": list(self.drop)}


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Recipes handed to the pipeline, which answers with a plan for a model of two blocks."""
    from prunekit.plan.cost import Cost

    def sublayer(block: int, kind: str, widths: dict[str, int]) -> SimpleNamespace:
        return SimpleNamespace(address=f"blocks.{block}.{kind}", kind=kind, widths=widths)

    blocks = [
        SimpleNamespace(
            index=i,
            attention=sublayer(i, "attention", {"kv": 1, "rep": 2, "hd": 4}),
            ffn=sublayer(i, "ffn", {"ffn": 8}),
            cross_attention=None,
            stack="",
            number=None,
        )
        for i in range(2)
    ]
    cost = {"block_params": 2_000, "flops_per_token": 4_000, "kv_bytes_per_token": 64, "weight_bytes": 12_000}
    seen: list[Any] = []

    def make_plan(recipe: Any, **options: Any) -> SimpleNamespace:
        seen.append(recipe)
        return SimpleNamespace(
            view=SimpleNamespace(blocks=blocks),
            plan=StandInPlan(),
            layout=SimpleNamespace(kind="stock"),
            before=Cost(params=40_000, **cost),
            after=Cost(params=30_000, **cost),
            orders=[Order("finercut", (OrderStep(("blocks.1.ffn",), 0.25),), {})],
            latency={},
        )

    monkeypatch.setattr("prunekit.pipeline.make_plan", make_plan)
    monkeypatch.setattr("prunekit.plan.loads.loads", lambda view, plan, layout: {"transformers": "yes: stock class"})
    return seen


def test_plan_shows_what_goes_and_where_it_loads(invoke, recipe_file) -> None:
    done = invoke(plan, "--recipe", recipe_file)
    assert done.exit_code == 0, done.exception
    assert "1 of 2 attention and 1 of 2 ffn sub-layers removed" in done.stdout
    assert "stock class" in done.stdout
    assert any(x.split() == ["parameters", "k", "40.0", "30.0", "-25.0"] for x in done.stdout.splitlines())


def test_plan_file_is_written_and_named_last(invoke, recipe_file, tmp_path) -> None:
    done = invoke(plan, "--recipe", recipe_file, "--output", tmp_path / "plan.json")
    assert done.stdout.splitlines()[-1] == str(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["drop"] == list(StandInPlan.drop)


def test_json_carries_orders_and_rows(invoke, recipe_file) -> None:
    data = json.loads(invoke(plan, "--recipe", recipe_file, "--json").stdout)
    assert data["orders"][0]["steps"][0]["distance"] == 0.25
    assert data["layer_map"][1]["ffn"]["state"] == "removed"
    assert data["after"]["params"] == 30_000


def test_existing_plan_file_is_refused_before_any_work(invoke, recipe_file, tmp_path, made) -> None:
    (tmp_path / "plan.json").write_text("mine")
    done = invoke(plan, "--recipe", recipe_file, "--output", tmp_path / "plan.json")
    assert isinstance(done.exception, UsageError)
    assert made == []
    assert (tmp_path / "plan.json").read_text() == "mine"


def test_existing_plan_file_is_replaced_with_overwrite(invoke, recipe_file, tmp_path) -> None:
    (tmp_path / "plan.json").write_text("mine")
    done = invoke(plan, "--recipe", recipe_file, "--output", tmp_path / "plan.json", "--overwrite")
    assert done.exit_code == 0, done.exception
    assert (tmp_path / "plan.json").read_text() != "mine"


def test_plan_file_in_missing_folder_is_refused_before_any_work(invoke, recipe_file, tmp_path, made) -> None:
    done = invoke(plan, "--recipe", recipe_file, "--output", tmp_path / "no" / "plan.json")
    assert isinstance(done.exception, UsageError)
    assert made == []


def test_plan_is_converted_from_one_format_to_another(invoke, tiny_llama, tmp_path) -> None:
    (tmp_path / "layers.txt").write_text("1,2\n")
    arguments = ("--from", tmp_path / "layers.txt", "--model", tiny_llama, "--to", "mergekit")
    done = invoke(plan, *arguments, "--output", tmp_path / "slices.yaml")
    assert done.exit_code == 0, done.exception
    slices = yaml.safe_load((tmp_path / "slices.yaml").read_text())["slices"]
    assert [entry["sources"][0]["layer_range"] for entry in slices] == [[0, 1], [3, 4]]
    assert slices[0]["sources"][0]["model"] == str(tiny_llama)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "needs a recipe or a plan"),
        (("--recipe", "RECIPE", "--model", "m"), "goes with `--from`"),
        (("--recipe", "RECIPE", "--to", "mergekit"), "needs a file"),
        (("--from", "RECIPE"), "needs the model"),
    ],
)
def test_options_that_do_not_go_together_are_refused(invoke, recipe_file, arguments, words, made) -> None:
    done = invoke(plan, *(recipe_file if part == "RECIPE" else part for part in arguments))
    assert isinstance(done.exception, UsageError)
    assert words in done.exception.what
    assert made == []
