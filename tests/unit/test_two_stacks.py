"""What prunekit says of a model with an encoder and a decoder, and what it refuses to do with one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from prunekit.core.errors import ExportError, PlanError, UsageError
from prunekit.core.recipe import parse_recipe
from prunekit.evaluate.subject import kind_of
from prunekit.modeling.families import auto_class
from prunekit.pipeline.choose import make_plan
from prunekit.pipeline.inputs import check_evaluation
from prunekit.plan.interchange import FORMATS, plan_text
from prunekit.plan.layout import choose_layout
from prunekit.plan.loads import loads
from prunekit.plan.plan import Plan
from prunekit.report.layer_map import LayerMap, Row, details, layer_map
from prunekit.structure.view import ModelView
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> ModelView:
    return ModelView.open(write_tiny("whisper", tmp_path_factory.mktemp("whisper") / "dense"))


def recipe(view: ModelView, step: dict[str, Any], **rest: Any) -> Any:
    step = {"remove": "blocks", "by": {"score": "last_k"}, "budget": {"units": 1}, **step}
    return parse_recipe({"schema": 1, "model": {"source": str(view.checkpoint.folder)}, "steps": [step], **rest})


@pytest.mark.parametrize(
    ("step", "what"),
    [
        ({"by": {"search": "finercut"}}, "`finercut` cannot run `whisper`"),
        ({"by": {"score": "block_influence"}}, "`block_influence` cannot run `whisper`"),
        ({"budget": {"latency_ms": 5.0}}, "a latency budget cannot run `whisper`"),
    ],
)
def test_what_runs_the_model_is_refused_by_name(view: ModelView, step: dict[str, Any], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_plan(recipe(view, step))
    assert caught.value.what == what
    assert "an encoder and a decoder" in caught.value.why


def test_measurements_are_refused_by_name(view: ModelView) -> None:
    with pytest.raises(UsageError, match=r"`evaluate\.latency` cannot run `whisper`"):
        check_evaluation(view, recipe(view, {}, evaluate={"latency": {"prompt_tokens": 4}}))
    assert kind_of(view.config) == "seq2seq"


def test_pairs_of_sublayers_are_refused_by_name(view: ModelView) -> None:
    step = {"remove": "sublayers", "by": {"score": "random"}, "budget": {"units": 2, "keep_alternating": True}}
    with pytest.raises(PlanError, match="several stacks cannot go in pairs"):
        make_plan(recipe(view, step))


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "prunekit"])
def test_formats_that_know_one_stack_are_refused(view: ModelView, name: str) -> None:
    plan = Plan.make(view, [s.address for s in view.blocks[0].sublayers])
    with pytest.raises(PlanError) as caught:
        plan_text(view, plan, name, "model")
    assert "several stacks" in caught.value.why


def test_protection_of_a_stack(view: ModelView) -> None:
    for stack, block in (("encoder", "decoder.blocks.3"), ("decoder", "encoder.blocks.2")):
        made = make_plan(recipe(view, {"budget": {"units": 1, "protect": [f"{stack}.*"]}}))
        assert {address.rpartition(".")[0] for address in made.plan.drop} == {block}


def test_cross_attention_is_a_kind_of_its_own(view: ModelView) -> None:
    step = {"remove": "cross_attention", "by": {"score": "magnitude"}, "budget": {"units": 2}}
    assert {address.rpartition(".")[2] for address in make_plan(recipe(view, step)).plan.drop} == {"cross_attention"}


def test_where_a_cut_loads(view: ModelView) -> None:
    plan = Plan.make(view, [s.address for s in view.blocks[-1].sublayers])
    found = loads(view, plan, choose_layout(view, plan))
    assert found["transformers"] == "yes: AutoModelForSpeechSeq2Seq, no custom code"
    assert found["ONNX Runtime"] == "no: models with an encoder and a decoder are not exported"
    assert auto_class(["PrunekitT5ForConditionalGeneration"]) == "AutoModelForSeq2SeqLM"


def test_onnx_is_refused_by_name(view: ModelView) -> None:
    from prunekit.export.targets import TARGETS

    with pytest.raises(ExportError, match="`whisper` cannot be written as ONNX"):
        TARGETS["onnx"].require(view, None)


def test_layer_map_has_a_part_for_each_stack(view: ModelView) -> None:
    drop = ("encoder.blocks.1.ffn", "decoder.blocks.2.cross_attention")
    plan = Plan.make(view, drop, {"decoder.blocks.0.cross_attention.kv_groups": (0, 1)})
    rows = layer_map(view, plan)
    assert [Row.from_json(row.to_json()) for row in rows] == rows
    assert details(rows) == [
        "removed encoder ffn: 1",
        "removed decoder cross_attention: 2",
        "narrowed decoder cross_attention kv_groups 4 -> 2: 0",
    ]
    out = io.StringIO()
    Console(file=out, width=120, no_color=True).print(LayerMap(rows))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert lines[1:8] == [
        "encoder          0",
        "attention        ███",
        "ffn              █·█",
        "decoder          0",
        "attention        ████",
        "cross_attention  ▄█·█",
        "ffn              ████",
    ]
