"""What a recipe's `require` lets through obeys the runtimes' rules, written down here a second time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from prunekit.core.errors import PlanError
from prunekit.core.recipe import Recipe, parse_recipe
from prunekit.pipeline.choose import Made, make_plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import write_tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 512},
    "qwen2": {"use_sliding_window": False},
    "gpt2": {"n_inner": 128, "n_ctx": 128},
    "bert": {},
}
RUNTIMES = ("vllm", "tensorrt_llm", "llama_cpp")


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, write_tiny(request.param, tmp_path_factory.mktemp("m") / "dense", **FAMILIES[request.param])


def recipe(folder: Path, steps: list[dict[str, Any]], **rest: Any) -> Recipe:
    return parse_recipe({"schema": 1, "model": {"source": str(folder)}, "steps": steps, **rest})


def random_step(draw: random.Random) -> dict[str, Any]:
    kind = draw.choice(["blocks", "sublayers", "sublayers", "attention", "ffn", "kv_groups", "neurons", "neurons"])
    budget: dict[str, Any] = {"remove": draw.choice([0.1, 0.25, 0.4])}
    if kind in ("neurons", "kv_groups"):
        budget["within"] = draw.choice(["group", "group", "model"])
        budget["remove"] = draw.choice([0.2, 0.5])
    return {"remove": kind, "by": {"score": "random", "seed": draw.randrange(99)}, "budget": budget}


def planned(folder: Path, seed: int) -> tuple[tuple[str, ...], Made | None]:
    draw = random.Random(seed)
    required = tuple(draw.sample(RUNTIMES, draw.randint(1, 2)))
    steps = [random_step(draw) for _ in range(draw.randint(1, 2))]
    try:
        return required, make_plan(recipe(folder, steps, require=list(required)))
    except PlanError:
        return required, None


def require_loadable(family: str, names: tuple[str, ...], made: Made, target: Path) -> None:
    """Depth, turns and widths of the written folder, from its configuration and tensor names alone."""
    if made.layout.kind == "heterogeneous":
        # As DeciLM, which vLLM does not load without attention in block 0; llama.cpp's `deci` takes the rest.
        assert family in ("llama", "qwen2")
        assert names == ("llama_cpp",) or all(len(kept) % 256 == 0 for kept in made.plan.keep.values())
        assert "vllm" not in names or "blocks.0.attention" not in made.plan.drop
        return
    target.mkdir()
    engine.apply(made.view, made.plan, target, layout=made.layout)
    config = json.loads((target / "config.json").read_text())
    assert config["model_type"] == family
    assert "auto_map" not in config
    if family == "gpt2":
        # One head count for all, tied to the hidden width.
        assert config["n_embd"] // config["n_head"] == 8
        return
    heads, width = config["num_attention_heads"], config.get("head_dim") or config["hidden_size"] // 4
    if family == "qwen2" and "vllm" in names:
        assert config["hidden_size"] // heads == width
    if family == "llama" and "llama_cpp" in names:
        assert config["intermediate_size"] % 256 == 0
    shapes = {name: info.shape for name, info in ModelView.open(target).checkpoint.tensors.items()}
    attention = "self_attn.q_proj.weight" if family != "bert" else "attention.self.query.weight"
    ffn = "mlp.up_proj.weight" if family != "bert" else "intermediate.dense.weight"
    for part, size in ((attention, heads * width), (ffn, config["intermediate_size"])):
        there = [shape for name, shape in shapes.items() if name.endswith(part)]
        assert len(there) == config["num_hidden_layers"]
        assert {shape[0] for shape in there} == {size}


def test_what_passes_obeys_the_rules(dense: tuple[str, Path], tmp_path: Path) -> None:
    family, folder = dense
    passed = 0
    for seed in range(30):
        names, made = planned(folder, seed)
        if made is not None:
            passed += 1
            require_loadable(family, names, made, tmp_path / f"{seed}")
    assert passed >= 3


STEP = {"remove": "sublayers", "by": {"score": "random"}, "budget": {"units": 2}}


@pytest.mark.parametrize(
    ("changes", "required", "at", "words"),
    [
        ({"remove": "kv_groups", "budget": {"units": 1, "within": "model"}}, "vllm", "steps.0", ("after step 1",)),
        ({"remove": "neurons", "budget": {"remove": 0.8}}, "llama_cpp", "steps.0", ("multiples of 256",)),
        ({"by": {"search": "finercut", "candidates": "ffn"}}, "vllm", "", ("candidates: ffn", "pairs")),
    ],
)
def test_refused_before_a_method_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, required: str, at: str, words: tuple[str, ...]
) -> None:
    folder = write_tiny("llama", tmp_path / "m", **FAMILIES["llama"])
    monkeypatch.setattr("prunekit.pipeline.choose._choose", None)
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(folder, [{**STEP, **changes}], require=[required]))
    error = caught.value
    assert error.at == at
    for word in words:
        assert word in f"{error.what} {error.why} {error.hint}"


@pytest.mark.parametrize(
    ("family", "steps", "words"),
    [
        ("bert", [{}], ("paired anew", "remove: blocks")),
        ("llama", [{"remove": "attention", "budget": {"units": 1}}, {}], ("do not take turns before", "one step")),
    ],
)
def test_alternation_that_is_impossible_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, steps: list[Any], words: tuple[str, ...]
) -> None:
    folder = write_tiny(family, tmp_path / "m")
    steps = [{**STEP, "budget": {"units": 2, "keep_alternating": True}, **changes} for changes in steps]
    monkeypatch.setattr("prunekit.pipeline.choose._choose", None)
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(folder, steps))
    for word in words:
        assert word in f"{caught.value.what} {caught.value.hint}"


@pytest.mark.parametrize("alternating", [True, False])
def test_replayed_order_is_held_to_the_turns(tmp_path: Path, alternating: bool) -> None:
    folder = write_tiny("llama", tmp_path / "m")
    steps = [{"units": ["blocks.1.ffn"], "distance": 0.1}, {"units": ["blocks.2.attention"], "distance": 0.2}]
    steps[1:] = steps[1:] if alternating else [{"units": ["blocks.3.attention"], "distance": 0.2}]
    (tmp_path / "order.json").write_text(json.dumps({"results": [{"method": "finercut", "steps": steps}]}))
    by = {"search": "replay", "file": str(tmp_path / "order.json")}
    found = recipe(folder, [{**STEP, "by": by, "budget": {"units": 2, "keep_alternating": True}}])
    if alternating:
        assert make_plan(found).layout.kind == "repacked"
    else:
        with pytest.raises(PlanError, match="go on taking turns"):
            make_plan(found)


def test_requirement_that_any_layout_keeps_restricts_nothing(tmp_path: Path) -> None:
    folder = write_tiny("llama", tmp_path / "m")
    step = {**STEP, "remove": "attention", "budget": {"units": 1}}
    made = make_plan(recipe(folder, [step], require=["prunekit", "onnxruntime", "remote_code"]))
    assert made.layout.kind == "heterogeneous"


def test_block_that_must_stay_for_a_stock_model_is_protected(tmp_path: Path) -> None:
    """ModernBERT's first attention has no norm, those of other blocks have."""
    folder = write_tiny("modernbert", tmp_path / "m")
    kinds: dict[bool, set[str]] = {True: set(), False: set()}
    for required in (True, False):
        for seed in range(8):
            step = {"remove": "blocks", "by": {"score": "random", "seed": seed}, "budget": {"units": 1}}
            made = make_plan(recipe(folder, [step], require=["transformers"] if required else []))
            kinds[required].add(made.layout.kind)
    assert kinds == {True: {"stock"}, False: {"stock", "heterogeneous"}}
