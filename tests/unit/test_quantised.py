"""Quantised checkpoints: sub-layers go whole and what stays is copied; what would cut a packed matrix is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prunekit import pipeline
from prunekit.cli.main import main
from prunekit.core.errors import PlanError, StructureError
from prunekit.core.recipe import parse_recipe
from prunekit.export.targets import TARGETS
from prunekit.modeling.load import load_model
from prunekit.plan.cost import cost
from prunekit.plan.layout import choose_layout
from prunekit.plan.loads import loads
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.quantised import METHODS, write_quantised
from tests.tiny import VOCAB, tiny_inputs, write_tiny

BLOCK_0 = ("blocks.0.attention", "blocks.0.ffn")
STAGGERED = ("blocks.0.ffn", "blocks.1.attention")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense") / "model"
    return write_tiny("llama", folder, dtype=torch.bfloat16, tie_word_embeddings=False)


@pytest.fixture(params=METHODS)
def quantised(request: pytest.FixtureRequest, dense: Path, tmp_path: Path) -> Path:
    return write_quantised(dense, tmp_path / "quantised", request.param)


def cut(folder: Path, target: Path, drop: tuple[str, ...]) -> Path:
    view = ModelView.open(folder)
    target.mkdir()
    engine.apply(view, Plan.make(view, drop), target)
    return target


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny_inputs("llama")).logits
    return found


@pytest.mark.parametrize(
    ("drop", "attention", "ffn"),
    [(BLOCK_0, (1, 2, 3), (1, 2, 3)), (STAGGERED, (0, 2, 3), (1, 2, 3))],
    ids=["block", "repacked"],
)
def test_packed_tensors_follow_their_blocks_byte_for_byte(
    quantised: Path, tmp_path: Path, drop: tuple[str, ...], attention: tuple[int, ...], ffn: tuple[int, ...]
) -> None:
    before = load_file(quantised / "model.safetensors")
    after = load_file(cut(quantised, tmp_path / "cut", drop) / "model.safetensors")
    expected = {name: name for name in before if ".layers." not in name}
    for sources, parts in ((attention, ("self_attn.", "input_layernorm.")), (ffn, ("mlp.", "post_attention_l"))):
        for new, old in enumerate(sources):
            begin = f"model.layers.{old}."
            rests = [name.removeprefix(begin) for name in before if name.startswith(begin)]
            expected |= {f"model.layers.{new}.{r}": begin + r for r in rests if r.startswith(parts)}
    assert after.keys() == expected.keys()
    for name, source in expected.items():
        assert after[name].dtype == before[source].dtype
        assert torch.equal(after[name].view(torch.uint8), before[source].view(torch.uint8))


def test_modules_left_as_they_were_are_renumbered(quantised: Path, tmp_path: Path) -> None:
    section = json.loads((cut(quantised, tmp_path / "cut", BLOCK_0) / "config.json").read_text())["quantization_config"]
    names = next(value for value in section.values() if isinstance(value, list) and "lm_head" in value)
    assert names == ["lm_head", "model.layers.0.mlp", "model.layers.2.self_attn.q_proj"]


def test_a_packed_matrix_counts_as_the_matrix_it_is(quantised: Path, dense: Path) -> None:
    view, plain = ModelView.open(quantised), ModelView.open(dense)
    for drop in ((), BLOCK_0):
        found, expected = cost(view, Plan.make(view, drop)), cost(plain, Plan.make(plain, drop))
        assert found.params == expected.params
        assert found.block_params == expected.block_params
        assert found.flops_per_token == expected.flops_per_token
        assert found.kv_bytes_per_token == expected.kv_bytes_per_token
    assert cost(view).weight_bytes == sum(info.n_bytes for info in view.checkpoint.tensors.values())


def test_inspect_names_the_method(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(write_quantised(dense, tmp_path / "quantised", "awq"))]) == 0
    assert "quantised" in (printed := capsys.readouterr().out)
    assert "awq" in printed


def test_widths_of_packed_matrices_stay(quantised: Path) -> None:
    view = ModelView.open(quantised)
    for kind in ("neurons", "kv_groups", "query_heads", "hidden"):
        with pytest.raises(StructureError, match="cannot be cut here") as caught:
            view.groups(kind)
        assert "is quantised" in caught.value.why
    with pytest.raises(PlanError, match=r"`blocks.2.ffn.neurons` cannot be narrowed") as narrowed:
        Plan.make(view, keep={"blocks.2.ffn.neurons": range(8)})
    assert "`model.layers.2.mlp." in narrowed.value.why
    # Block 1 has a plain FFN.
    assert Plan.make(view, keep={"blocks.1.ffn.neurons": range(8)}).keep


def test_rows_of_the_vocabulary_can_go_where_their_tensors_are_plain(quantised: Path) -> None:
    view = ModelView.open(quantised)
    assert view.vocabulary == VOCAB
    assert Plan.make(view, keep={"vocab": range(8)}).keep


def recipe(folder: Path, score: str, **more: Any) -> Any:
    steps = [{"remove": "blocks", "by": {"score": score}, "budget": {"units": 1}}]
    return parse_recipe({"schema": 1, "model": {"source": str(folder)}, "steps": steps, **more})


def test_scores_of_weights_refuse_packed_ones_and_a_plan_of_the_dense_model_fits(
    quantised: Path, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(StructureError, match="cannot be scored") as caught:
        pipeline.make_plan(recipe(quantised, "gardener"))
    assert "prunekit apply" in caught.value.hint
    assert len(pipeline.make_plan(recipe(quantised, "last_k")).plan.drop) == 2
    plan = pipeline.make_plan(recipe(dense, "gardener")).plan
    (tmp_path / "cut").mkdir()
    assert engine.apply(ModelView.open(quantised), plan, tmp_path / "cut").kind == "stock"


def test_formats_and_training_that_need_plain_weights_refuse(quantised: Path, tmp_path: Path) -> None:
    view = ModelView.open(quantised)
    for name in ("gguf", "deci", "masked"):
        with pytest.raises(PlanError, match=r"quantised|cannot be DeciLM"):
            TARGETS[name].require(view, None)
    for more in ({"heal": {"method": "finetune", "data": "wikitext2"}}, {"repair": {"method": "least_squares"}}):
        with pytest.raises(PlanError, match="does not go with a quantised checkpoint"):
            pipeline.run(recipe(quantised, "last_k", **more), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    plan = Plan.make(view, BLOCK_0)
    assert "through `prunekit export" not in loads(view, plan, choose_layout(view, plan))["llama.cpp"]


def test_fp8_computes_what_is_left_of_the_model(dense: Path, tmp_path: Path) -> None:
    """transformers unpacks fp8 on a CPU, so that this one can be run."""
    folder = write_quantised(dense, tmp_path / "quantised", "fp8")
    expected = load_model(folder)
    attention = expected.model.layers[1].self_attn.o_proj
    attention.weight.data.zero_()
    attention.bias.data.zero_()
    own_class = load_model(cut(folder, tmp_path / "own class", ("blocks.1.attention",)))
    assert torch.equal(logits(own_class), logits(expected))
    layers = expected.model.layers
    layers[1].self_attn, layers[1].input_layernorm = layers[0].self_attn, layers[0].input_layernorm
    del layers[0]
    for number, layer in enumerate(layers):
        layer.self_attn.layer_idx = number
    expected.config.num_hidden_layers = len(layers)
    repacked = load_model(cut(folder, tmp_path / "repacked", STAGGERED))
    assert torch.equal(logits(repacked), logits(expected))


@pytest.mark.parametrize("method", ["fp8", "gptq", "nf4"])
def test_packed_tensors_of_two_stacks_follow_their_blocks(tmp_path: Path, method: str) -> None:
    dense = write_tiny("whisper", tmp_path / "dense", dtype=torch.bfloat16)
    folder = write_quantised(dense, tmp_path / "quantised", method)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["plain"] = [f"model.{stack}.layers.2.fc1" for stack in ("encoder", "decoder")]
    (folder / "config.json").write_text(json.dumps(config))
    view, plain = ModelView.open(folder), ModelView.open(dense)
    drop = tuple(s.address for block in (view.blocks[0], view.blocks[4]) for s in block.sublayers)
    assert {address.rpartition(".")[0] for address in drop} == {"encoder.blocks.0", "decoder.blocks.1"}
    for gone in ((), drop):
        found, expected = cost(view, Plan.make(view, gone)), cost(plain, Plan.make(plain, gone))
        assert (found.params, found.flops_per_token) == (expected.params, expected.flops_per_token)
    with pytest.raises(PlanError, match=r"`decoder.blocks.2.cross_attention.kv_groups` cannot be narrowed"):
        Plan.make(view, keep={"decoder.blocks.2.cross_attention.kv_groups": range(2)})
    before = load_file(folder / "model.safetensors")
    after = load_file(cut(folder, tmp_path / "cut", drop) / "model.safetensors")
    moved = {"encoder": {1: 0, 2: 1}, "decoder": {0: 0, 2: 1, 3: 2}}
    expected_names = {name: name for name in before if ".layers." not in name}
    for stack, places in moved.items():
        for old, new in places.items():
            begin = f"model.{stack}.layers.{old}."
            rests = [name.removeprefix(begin) for name in before if name.startswith(begin)]
            expected_names |= {f"model.{stack}.layers.{new}.{rest}": begin + rest for rest in rests}
    assert after.keys() == expected_names.keys()
    for name, source in expected_names.items():
        assert torch.equal(after[name].view(torch.uint8), before[source].view(torch.uint8))
    section = json.loads((tmp_path / "cut" / "config.json").read_text())["quantization_config"]
    assert section["plain"] == ["model.encoder.layers.1.fc1", "model.decoder.layers.1.fc1"]
