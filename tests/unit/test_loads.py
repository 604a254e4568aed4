"""Where results load: three states, reasons, the smallest change, and what a runtime makes of widths."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from prunekit.core.recipe_model import Target
from prunekit.plan.layout import choose_layout
from prunekit.plan.loads import Place, loads, places, runtimes
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from tests.tiny import BLOCKS, write_tiny

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2", "bert", "vit")
OTHERS = ("vllm", "tensorrt_llm", "llama_cpp")


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelView]:
    folder = tmp_path_factory.mktemp("models")
    return {family: ModelView.open(write_tiny(family, folder / family)) for family in FAMILIES}


def where(view: ModelView, drop: Any = (), keep: Any = None) -> dict[str, Place]:
    plan = Plan.make(view, drop, keep)
    return places(view, plan, choose_layout(view, plan))


def heads(kept: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"blocks.{i}.attention.kv_groups": kept for i in range(BLOCKS)}


def test_every_name_of_require_has_a_place(views: dict[str, ModelView]) -> None:
    for view in views.values():
        assert set(where(view)) == set(get_args(Target))


def test_every_text_begins_with_its_state(views: dict[str, ModelView]) -> None:
    view = views["llama"]
    for drop in ((), ("blocks.1.ffn",)):
        plan = Plan.make(view, drop)
        found = loads(view, plan, choose_layout(view, plan))
        assert all(text.split(":")[0] in ("yes", "no", "not known") for text in found.values())
        assert found["transformers"].startswith("no" if drop else "yes: AutoModelForCausalLM")


@pytest.mark.parametrize(
    ("drop", "change"),
    [
        (["blocks.0.attention"], "remove blocks.0.ffn too"),
        (["blocks.1.ffn"], "remove blocks.2.attention too"),
        (["blocks.0.attention", "blocks.2.attention"], "remove blocks.0.ffn and blocks.2.ffn too"),
        (["blocks.3.ffn"], "remove blocks.3.attention too"),
    ],
)
def test_change_that_is_suggested_makes_it_load(views: dict[str, ModelView], drop: list[str], change: str) -> None:
    view = views["llama"]
    place = where(view, drop)["vllm"]
    assert (place.loads, place.change) == (False, change)
    more = [word for word in change.split() if word.startswith("blocks.")]
    assert where(view, [*drop, *more])["vllm"].loads is True


def test_post_norm_models_are_told_to_remove_the_rest_of_the_block(views: dict[str, ModelView]) -> None:
    place = where(views["bert"], ["blocks.1.ffn"])["transformers"]
    assert (place.loads, place.change) == (False, "remove blocks.1.attention too")


def test_unequal_widths_are_told_to_be_equal(views: dict[str, ModelView]) -> None:
    place = where(views["qwen3"], keep={"blocks.1.ffn.neurons": range(32)})["llama_cpp"]
    assert (place.loads, "within: group" in place.change) == (False, True)
    assert "all blocks have the same widths" in place.how


def test_heads_tied_to_the_hidden_width_are_told_to_stay(views: dict[str, ModelView]) -> None:
    assert where(views["bert"], keep=heads((0, 1)))["transformers"].change == "leave the heads whole"


@pytest.mark.parametrize(
    ("family", "states"),
    [("llama", (True, True, True)), ("qwen3", (True, True, True)), ("qwen2", (False, True, False))],
)
def test_fewer_heads_need_a_class_that_reads_their_width(
    views: dict[str, ModelView], family: str, states: tuple[bool, ...]
) -> None:
    found = where(views[family], keep=heads((0,)))
    assert tuple(found[name].loads for name in OTHERS) == states
    assert all(where(views[family])[name].loads for name in OTHERS)


def test_unread_classes_are_not_known_and_refused_ones_no(views: dict[str, ModelView]) -> None:
    found = where(views["vit"], ["blocks.1.attention", "blocks.1.ffn"])
    assert [found[name].loads for name in OTHERS] == [None, None, False]
    assert found["transformers"].loads
    assert found["onnxruntime_genai"].loads is False
    assert where(views["gpt2"])["onnxruntime_genai"].loads is True


def test_what_prunekit_writes_for_llama_cpp_needs_no_converter(tmp_path: Path) -> None:
    """llama.cpp's own takes no `n_inner`, and no sub-layers that are missing."""
    view = ModelView.open(write_tiny("gpt2", tmp_path / "m", n_inner=128))
    narrow = {f"blocks.{i}.ffn.neurons": range(64) for i in range(BLOCKS)}
    assert "export --format gguf`, as its `gpt2`" in where(view, keep=narrow)["llama_cpp"].how
    assert where(view, ["blocks.1.ffn"])["llama_cpp"].loads is False


@pytest.mark.parametrize(
    ("drop", "states"),
    [(("blocks.1.attention",), (True, True, True)), (("blocks.0.attention",), (False, True, True))],
)
def test_blocks_that_differ_load_as_decilm(tmp_path: Path, drop: tuple[str, ...], states: tuple[bool, ...]) -> None:
    view = ModelView.open(write_tiny("llama", tmp_path / "m", intermediate_size=256, attention_bias=False))
    found = where(view, drop)
    assert tuple(found[name].loads for name in OTHERS) == states
    assert "--format deci" in found["tensorrt_llm"].how
    assert "as its `deci`" in found["llama_cpp"].how


def test_width_that_quantises_badly_is_said(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("llama", tmp_path / "m", intermediate_size=512))
    for width, said in ((256, False), (200, True)):
        keep = {f"blocks.{i}.ffn.neurons": range(width) for i in range(BLOCKS)}
        place = where(view, keep=keep)["llama_cpp"]
        assert (place.loads, "k-quants" in place.how) == (True, said)


def test_rules_of_other_runtimes_name_their_source() -> None:
    for runtime in runtimes().values():
        assert "@" in runtime.source
        for rule in runtime.rules:
            assert rule.loads is None or "@" in rule.source
            assert rule.loads is True or rule.why
