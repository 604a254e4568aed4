"""Cost tables measured on small models, and recipes that keep to them, in torch and in ONNX Runtime."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import prunekit.pipeline.costs as costs_module
from prunekit import pipeline
from prunekit.cli.main import main
from prunekit.core.recipe import parse_recipe
from prunekit.pipeline.costs import Pass, cached_costs, pass_times
from prunekit.plan.costs import CostTable, model_of, read_costs
from prunekit.structure.view import ModelView
from tests.tiny import BLOCKS, FFN, write_tiny

# Enough work that removing it can be measured on a busy machine.
WIDE = {"hidden_size": 128, "intermediate_size": 1024}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNEKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_table_is_measured_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = ModelView.open(write_tiny("llama", tmp_path / "model"))
    asked = Pass(tokens=8, repeats=2)
    first = cached_costs(view, asked)
    assert first.model == model_of(view)
    assert first.measured["blocks"] == BLOCKS
    assert set(first.attention) == {2, 1}
    assert set(first.ffn) == {FFN, FFN * 3 // 4, FFN // 2, FFN // 4}
    monkeypatch.setattr(costs_module, "measure_costs", lambda *given: pytest.fail("measured again"))
    assert cached_costs(view, asked) == first
    with pytest.raises(pytest.fail.Exception):
        cached_costs(view, Pass(tokens=9, repeats=2))


class Machine:
    """Passes of made-up models on a machine that slows down to a third, and sometimes does something else."""

    def __init__(self) -> None:
        self.passes = 0

    def one_pass(self, model: float, batch: int, tokens: int) -> tuple[Callable[[], tuple[None, float]], int, bool]:
        def run() -> tuple[None, float]:
            self.passes += 1
            slow = 3 if self.passes > 60 else 1
            return None, model * slow + (0.5 if self.passes % 7 == 0 else 0)

        return run, tokens, False


def test_shares_hold_while_the_machine_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.evaluate.latency.one_pass", Machine().one_pass)
    asked = {"batch": 1, "tokens": 8, "predicted_ms": 7.0, "dense_predicted_ms": 10.0}
    found = pass_times(asked, 0.007, 0.010, repeats=80)
    assert found["measured_share"] == pytest.approx(0.7)
    assert found["share_predicted_to_measured"] == pytest.approx(1)
    assert found["measured_ms"] == pytest.approx(7)


@pytest.mark.parametrize(("scatter", "least", "most"), [(0.0, 22, 22), (0.4, 50, 64)])
def test_passes_that_scatter_are_run_more_often(
    monkeypatch: pytest.MonkeyPatch, scatter: float, least: int, most: int
) -> None:
    random, passes = Random(0), []

    def run() -> tuple[None, float]:
        passes.append(0.2 * (1 + scatter * random.random()))
        return None, passes[-1]

    monkeypatch.setattr("prunekit.evaluate.latency.one_pass", lambda model, batch, tokens: (run, tokens, False))
    asked = {"batch": 1, "tokens": 8, "predicted_ms": 1.0, "dense_predicted_ms": 1.0}
    pass_times(asked, "cut", "dense", repeats=10)
    # The first of each does not count.
    assert least <= len(passes) <= most


@pytest.mark.slow
def test_costs_follow_the_work(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("llama", tmp_path / "model", **WIDE))
    table = costs_module.measure_costs(view, Pass(batch=4, tokens=64, repeats=20, widths=("neurons",)))
    # An FFN of 1,024 neurons has 8 times the weights of the attention beside it.
    assert table.ffn[1024] > table.attention[2]
    assert table.ffn[1024] > table.ffn[256]


def table_file(view: ModelView, file: Path, on: str = "torch") -> CostTable:
    """A made-up table, so that what is planned does not depend on the machine."""
    table = CostTable(on, 1, 16, model_of(view), 1.0, {2: 2.0}, {FFN: 3.0}, {"machine": {}}, {"blocks": BLOCKS})  # type: ignore[arg-type]
    file.write_text(json.dumps(table.to_json()), encoding="utf-8")
    return table


def recipe(folder: Path, costs: Path, search: bool = False, on: str = "torch", **more: Any) -> Any:
    by = {"search": "finercut", "per": "latency_ms", "distance": "norm"} if search else {"score": "last_k"}
    budget = {"latency_ms": 14.0, "tokens": 16, "costs": str(costs), "on": on}
    data = {
        "schema": 1,
        "model": {"source": str(folder)},
        "calibrate": {"data": "wikitext2", "sequences": 2, "length_tokens": 16},
        "steps": [{"remove": "sublayers", "by": by, "budget": budget}],
        **more,
    }
    return parse_recipe(data)


def test_a_run_says_what_was_predicted_and_what_was_measured(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "model")
    view = ModelView.open(folder)
    table = table_file(view, tmp_path / "costs.json")
    result = pipeline.run(recipe(folder, tmp_path / "costs.json", expect={"latency_ms_max": 1e-6}), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "prunekit.json").read_text())["latency"]
    # 21 ms must become 14. The deepest are worth least: an FFN, an attention and an FFN take 8.
    assert found["predicted_ms"] == table.predict(view, result.made.plan) == 13.0
    assert found["dense_predicted_ms"] == 21.0
    assert found["measured_ms"] > 0
    assert found["dense_measured_ms"] > 0
    assert found["predicted_to_measured"] == pytest.approx(13.0 / found["measured_ms"])
    assert found["predicted_share"] == pytest.approx(13.0 / 21.0)
    assert found["share_predicted_to_measured"] == pytest.approx(13.0 / 21.0 / found["measured_share"])
    assert CostTable.from_json(found["costs"]) == table
    assert result.after["latency_ms"] == found["measured_ms"]
    (judged,) = result.expectations
    assert judged == {"name": "latency_ms_max", "limit": 1e-6, "value": found["measured_ms"], "ok": False}
    assert "predicted to measured" in (tmp_path / "out" / "README.md").read_text()


def test_a_search_keeps_to_the_table(small: Callable[[str], Path], tmp_path: Path) -> None:
    folder = small("llama")
    table = table_file(ModelView.open(folder), tmp_path / "costs.json")
    made = pipeline.make_plan(recipe(folder, tmp_path / "costs.json", search=True))
    assert table.predict(made.view, made.plan) <= 14.0
    assert table.predict(made.view, made.plan) > 14.0 - 3.0


def test_the_command_writes_a_table_that_a_recipe_reads(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = write_tiny("bert", tmp_path / "model"), tmp_path / "costs.json"
    common = ["costs", str(folder), "--tokens", "8", "--repeats", "1", "--no-widths", "--quiet"]
    assert main([*common, "--output", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(file)
    table = read_costs(file)
    assert (table.on, table.batch, table.tokens, len(table.attention)) == ("torch", 1, 8, 1)
    assert main([*common, "--output", str(file)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([*common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ffn"] == {str(FFN): table.ffn[FFN]}


def test_one_block_alone_cannot_be_measured(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny("llama", tmp_path / "model", num_hidden_layers=1)
    assert main(["costs", str(folder), "--quiet"]) == 1
    assert "1 of 1 blocks" in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_runtime_has_its_own_table(tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    folder = write_tiny("llama", tmp_path / "model")
    view = ModelView.open(folder)
    table = cached_costs(view, Pass("onnxruntime", tokens=8, repeats=2, widths=("kv_groups",)))
    assert set(table.attention) == {2, 1}
    assert table.environment["dtype"] == "float32"
    table_file(view, tmp_path / "costs.json", "onnxruntime")
    chosen = recipe(folder, tmp_path / "costs.json", on="onnxruntime", export={"formats": ["safetensors", "onnx"]})
    result = pipeline.run(chosen, tmp_path / "out")
    assert result.latency["on"] == "onnxruntime"
    assert result.latency["measured_ms"] > 0
    assert result.before["latency_ms"] == result.latency["dense_measured_ms"] > 0


@pytest.mark.slow
def test_prediction_of_a_real_model_comes_near(tmp_path: Path, cache: Path) -> None:
    """As a share of the dense model's time, measured in turn with it, since other work slows both alike."""
    from prunekit.checkpoint.sources import resolve
    from prunekit.modeling.load import load_model
    from prunekit.plan.layout import choose_layout
    from prunekit.plan.plan import Plan
    from prunekit.surgery import engine

    view = ModelView.open(resolve("all-minilm-l6-v2").folder)
    table = costs_module.measure_costs(view, Pass(batch=2, tokens=64, repeats=60, widths=()))
    plan = Plan.make(view, [f"blocks.{i}.{kind}" for i, kind in ((1, "attention"), (2, "ffn"), (4, "ffn"))])
    (tmp_path / "cut").mkdir()
    engine.apply(view, plan, tmp_path / "cut", layout=choose_layout(view, plan))
    times = {"predicted_ms": table.predict(view, plan), "dense_predicted_ms": table.predict(view)}
    dense, cut = load_model(view.checkpoint.folder), load_model(tmp_path / "cut")
    found = pass_times({"batch": 2, "tokens": 64, **times}, cut, dense, repeats=60)
    assert found["share_predicted_to_measured"] == pytest.approx(1, rel=0.15)
