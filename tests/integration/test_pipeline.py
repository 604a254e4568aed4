"""Recipes from start to end on small models with a real tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import prunekit.pipeline.carry_out as carry_out
from prunekit import pipeline
from prunekit.core.errors import PlanError, PrunekitError, UsageError
from prunekit.core.files import write_json
from prunekit.core.recipe import load_recipe, parse_recipe
from prunekit.core.types import Order
from prunekit.export.onnx import export_onnx
from prunekit.export.verify import VerifyReport
from prunekit.plan.interchange import read_plan
from prunekit.structure.view import ModelView
from tests.tiny import BLOCKS, FFN

Small = Callable[[str], Path]
CALIBRATE = {"sequences": 2, "length_tokens": 16}


def recipe(folder: Path, *steps: dict[str, Any], **sections: Any) -> Any:
    return parse_recipe(
        {"schema": 1, "model": {"source": str(folder)}, "calibrate": CALIBRATE, "steps": list(steps), **sections}
    )


def step(kind: str, by: dict[str, Any], **budget: Any) -> dict[str, Any]:
    return {"remove": kind, "by": by, "budget": budget}


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the two fresh processes out where another test of the same layout has them."""
    report = VerifyReport(Path(), ())
    monkeypatch.setattr(carry_out, "_verified", lambda *arguments: report)


BLOCK = step("blocks", {"score": "gardener"}, units=1)


def digest(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_run_writes_a_whole_folder_and_leaves_the_source_alone(small: Small, tmp_path: Path) -> None:
    source = small("llama")
    before = digest(source)
    asked = recipe(
        source,
        BLOCK,
        evaluate={
            "perplexity": {"sequences": 2, "length_tokens": 16},
            "latency": {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1},
            "sample": {"prompt": "Once", "new_tokens": 3},
        },
        expect={"loads_stock": True, "perplexity_max": 1.0},
    )
    result = pipeline.run(asked, tmp_path / "o")
    assert digest(source) == before
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    names = {p.name for p in (tmp_path / "o").iterdir()}
    assert {"model.safetensors", "config.json", "prunekit.json", "recipe.yaml"} <= names
    assert {"README.md", "layer_map.png", "report.html"} <= names
    manifest = json.loads((tmp_path / "o" / "prunekit.json").read_text())
    assert manifest["source"]["sha256"]["model.safetensors"] == before["model.safetensors"]
    assert manifest["after"]["block_params"] * BLOCKS == manifest["before"]["block_params"] * (BLOCKS - 1)
    assert manifest["verified"]["ok"]
    assert manifest["after"]["perplexity"] > 1
    assert [entry["ok"] for entry in result.expectations] == [False, True]
    # The recipe that lies in the folder is the one that was run.
    assert load_recipe(tmp_path / "o" / "recipe.yaml").effective() == asked.effective()


@pytest.mark.parametrize(("candidates", "layout"), [("sublayers", "heterogeneous"), ("pairs", "repacked")])
def test_search_ends_in_the_layout_its_candidates_promise(
    small: Small, tmp_path: Path, candidates: str, layout: str
) -> None:
    asked = recipe(small("qwen3"), step("sublayers", {"search": "finercut", "candidates": candidates}, remove=0.2))
    result = pipeline.run(asked, tmp_path / "o")
    assert result.made.layout.kind in (layout, "stock")
    assert result.verified.ok


def test_required_runtime_makes_a_search_take_pairs(small: Small) -> None:
    made = pipeline.make_plan(
        recipe(small("llama"), step("sublayers", {"search": "finercut"}, units=2), require=["vllm"])
    )
    assert made.layout.kind in ("stock", "repacked")
    assert made.orders[0].provenance["candidates"] == "pairs"
    assert [len(entry.units) for entry in made.orders[0].steps] == [2]


REPAIR = {"method": "least_squares", "calibrate": {"sequences": 8, "length_tokens": 16}}


def test_repaired_folder_computes_what_the_repaired_dense_model_does(small: Small, tmp_path: Path) -> None:
    asked = recipe(small("llama"), step("sublayers", {"search": "finercut"}, units=2), repair=REPAIR)
    result = pipeline.run(asked, tmp_path / "o")
    assert result.verified.ok
    # Compared in a fresh process with the dense model without what was removed, repaired the same way.
    assert result.verified.max_abs_diff is not None
    assert result.verified.max_abs_diff < 1e-9
    assert result.made.repaired


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "asked",
    [step("sublayers", {"search": "finercut"}, units=2), step("neurons", {"score": "wanda"}, remove=0.25)],
    ids=["sublayers", "neurons"],
)
def test_repair_changes_output_projections_alone(
    small: Small, tmp_path: Path, family: str, asked: dict[str, Any], unverified: None
) -> None:
    raw = pipeline.run(recipe(small(family), asked), tmp_path / "raw")
    repaired = pipeline.run(recipe(small(family), asked, repair=REPAIR), tmp_path / "repaired")
    assert raw.made.plan == repaired.made.plan
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("raw", "repaired"))
    assert {n: (t.shape, t.dtype) for n, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    changed = {name.rpartition(".")[0] for name in before if not before[name].equal(after[name])}
    last = ("o_proj", "down_proj", "c_proj")
    assert changed
    assert {name.rpartition(".")[2] for name in changed} <= set(last)
    manifest = json.loads((tmp_path / "repaired" / "prunekit.json").read_text())
    assert manifest["repair"]["knobs"] == {"ridge": 0.3}
    assert manifest["repair"]["error"] > 0
    assert load_recipe(tmp_path / "repaired" / "recipe.yaml").repair.calibrate.sequences == 8


def test_later_steps_choose_from_what_earlier_ones_left(small: Small, tmp_path: Path, unverified: None) -> None:
    asked = recipe(
        small("llama"),
        step("neurons", {"score": "magnitude"}, remove=0.25, within="group"),
        step("sublayers", {"search": "finercut"}, units=2),
        step("neurons", {"score": "magnitude"}, units=4, within="group"),
    )
    made = pipeline.make_plan(asked)
    left = made.plan.keep
    assert {len(kept) for kept in left.values()} == {FFN - 12 - 4}
    assert len(made.plan.drop) == 2
    assert not {a.rpartition(".")[0] for a in left} & set(made.plan.drop)
    result = pipeline.run(asked, tmp_path / "o")
    assert ModelView.open(tmp_path / "o").sublayers[1].kind in ("attention", "ffn")
    assert result.after["params"] == made.after.params


def test_weights_of_later_steps_are_those_that_are_left(small: Small) -> None:
    """Two cuts of a quarter each remove the same neurons as one cut of the sum."""
    folder = small("llama")
    twice = recipe(folder, *[step("neurons", {"score": "magnitude"}, units=6, within="group")] * 2)
    once = recipe(folder, step("neurons", {"score": "magnitude"}, units=12, within="group"))
    assert pipeline.make_plan(twice).plan == pipeline.make_plan(once).plan


def test_encoder_is_compared_by_its_embeddings(small: Small, tmp_path: Path, unverified: None) -> None:
    asked = recipe(
        small("bert"),
        step("sublayers", {"search": "finercut", "distance": "angular"}, units=1),
        evaluate={"embedding": {"sequences": 3, "length_tokens": 16}},
    )
    result = pipeline.run(asked, tmp_path / "o")
    assert result.before["embedding_cosine"] == pytest.approx(1.0)
    assert -1 <= result.after["embedding_cosine"] < 1


def test_images_are_noise_or_a_file(small: Small, tmp_path: Path) -> None:
    from tests.tiny import write_tiny

    folder = write_tiny("vit", tmp_path / "vit")
    by = step("sublayers", {"search": "finercut", "distance": "angular"}, units=1)
    with pytest.raises(UsageError, match="no images named `wikitext2`"):
        pipeline.make_plan(recipe(folder, by))
    asked = parse_recipe(
        {
            "schema": 1,
            "model": {"source": str(folder)},
            "calibrate": {**CALIBRATE, "data": "noise"},
            "steps": [by],
            "evaluate": {"embedding": {"data": "noise", "sequences": 2}},
        }
    )
    assert pipeline.run(asked, tmp_path / "o").verified.ok


def test_onnx_of_the_result_computes_the_same_and_is_smaller_than_the_dense_one(small: Small, tmp_path: Path) -> None:
    asked = recipe(
        small("llama"),
        step("sublayers", {"search": "finercut", "candidates": "pairs"}, remove=0.25),
        export={"formats": ["safetensors", "onnx"]},
        expect={"onnx_max_abs_diff": 1e-3},
    )
    result = pipeline.run(asked, tmp_path / "o")
    dense = export_onnx(small("llama"), tmp_path / "dense")
    assert result.after["onnx_bytes"] < dense.file_bytes
    assert [entry["ok"] for entry in result.expectations] == [True]
    checks = {check.name: check for check in result.verified.checks}
    assert "greedy tokens equal" in checks["onnx computes what torch does"].detail


def test_what_a_method_was_made_from_is_recorded(small: Small) -> None:
    (scores,) = pipeline.make_plan(recipe(small("llama"), BLOCK)).orders
    assert scores.provenance == {"knobs": {"precision": "float16"}}
    (order,) = pipeline.make_plan(recipe(small("llama"), step("ffn", {"search": "finercut"}, units=1))).orders
    assert order.provenance["knobs"]["distance"] == "js"
    assert order.provenance["calibrate"]["sequences"] == CALIBRATE["sequences"]


def test_order_searched_once_serves_every_fraction(small: Small, tmp_path: Path) -> None:
    by = {"search": "finercut", "candidates": "blocks"}
    made = pipeline.make_plan(recipe(small("llama"), step("sublayers", by, remove=0.5, of="params")))
    write_json(tmp_path / "order.json", {"results": [order.to_json() for order in made.orders]})
    replayed = {"search": "replay", "file": str(tmp_path / "order.json")}
    quarter = pipeline.make_plan(recipe(small("llama"), step("sublayers", replayed, remove=0.25, of="params")))
    (order,) = made.orders
    assert isinstance(order, Order)
    assert set(quarter.plan.drop) == set(order.steps[0].units)


def test_plan_replays_on_the_same_model(small: Small, tmp_path: Path) -> None:
    made = pipeline.make_plan(recipe(small("llama"), BLOCK))
    write_json(tmp_path / "plan.json", made.plan.to_json())
    assert read_plan(tmp_path / "plan.json", ModelView.open(small("llama"))) == made.plan


BAD: list[tuple[str, dict[str, Any], type[PrunekitError], str]] = [
    ("fraction leaves nothing", {"steps": [step("blocks", {"score": "random"}, remove=0.99)]}, PlanError, "cannot be"),
    ("units leave nothing", {"steps": [step("blocks", {"score": "random"}, units=4)]}, PlanError, "leaves nothing"),
    ("protected pattern", {"steps": [step("blocks", {"score": "random"}, units=1, protect=["x.*"])]}, PlanError, "x.*"),
    (
        "stock wanted of unequal blocks",
        {"steps": [step("ffn", {"score": "random"}, units=1)], "export": {"layout": "stock"}},
        PlanError,
        "stock",
    ),
    ("too long a text", {"calibrate": {"sequences": 10_000_000}}, UsageError, "too short"),
    ("no such text", {"calibrate": {"data": "wikitxt2"}}, UsageError, "wikitxt2"),
    ("device", {"model": {"device": "cuda:7"}}, UsageError, "cuda:7"),
    ("multiple", {"steps": [step("neurons", {"score": "random"}, remove=0.9, multiple_of=16)]}, PlanError, "too few"),
]


@pytest.mark.parametrize(("change", "error", "words"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_one_error_and_leaves_nothing(
    small: Small, tmp_path: Path, change: dict[str, Any], error: type[PrunekitError], words: str
) -> None:
    data: dict[str, Any] = {
        "schema": 1,
        "model": {"source": str(small("llama"))},
        "calibrate": CALIBRATE,
        "steps": [step("sublayers", {"search": "finercut"}, units=1)],
    }
    for key, value in change.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) and key in data else value
    with pytest.raises(error) as caught:
        pipeline.run(parse_recipe(data), tmp_path / "o")
    assert words in f"{caught.value.what} {caught.value.why}"
    assert list(tmp_path.iterdir()) == []


def test_output_that_exists_is_refused_before_the_model_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="exists"):
        pipeline.run(recipe(tmp_path / "nothing", BLOCK), tmp_path)


def test_perplexity_of_an_encoder_is_refused_before_any_work(small: Small, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="writes text"):
        pipeline.run(recipe(small("bert"), BLOCK, evaluate={"perplexity": "wikitext2_eval"}), tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("family", "repair", "error", "words"),
    [
        ("llama", {"calibrate": {"sequences": 10**6}}, UsageError, "is too short"),
        ("bert", {}, PlanError, "a norm follows each sum"),
    ],
)
def test_a_repair_that_cannot_be_is_refused_before_any_search(
    small: Small,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    repair: dict[str, Any],
    error: type,
    words: str,
) -> None:
    monkeypatch.setattr(carry_out, "make_plan", None)
    asked = recipe(small(family), BLOCK, repair={"method": "least_squares", **repair})
    with pytest.raises(error) as caught:
        pipeline.run(asked, tmp_path / "o")
    assert words in f"{caught.value.what} {caught.value.why}"
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_leaves_nothing_and_the_next_one_works(small: Small, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        json.dumps(
            {
                **recipe(small("llama"), BLOCK).effective(),
                "evaluate": {"latency": {"prompt_tokens": 64, "repeats": 500}},
            }
        )
    )
    command = [sys.executable, "-m", "prunekit.cli.main", "prune", "--recipe", str(file), "-o", str(tmp_path / "o")]
    # A shell without job control starts what runs in the background deaf to it, tests too.
    hears = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=hears)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".o.*.part/model.safetensors")) and time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=120)
    assert running.returncode == 130
    assert "interrupted" in said
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]
    pipeline.run(recipe(small("llama"), BLOCK), tmp_path / "o")
    assert os.path.isdir(tmp_path / "o")
