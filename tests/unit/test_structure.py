"""Structure of every family, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunekit.core.errors import StructureError
from prunekit.structure.architecture import architecture, architectures
from prunekit.structure.view import ModelView
from tests.tiny import BLOCKS, DECODERS, FAMILIES, FFN, GROUPED, HEAD, HEADS, KV_HEADS, NEURONS, write_tiny


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_covered_exactly_once(folders: dict[str, Path], family: str) -> None:
    view = ModelView.open(folders[family])
    names = [ref.name for sublayer in view.sublayers for ref in sublayer.tensors] + [ref.name for ref in view.outer]
    assert len(names) == len(set(names))
    assert set(names) == set(view.checkpoint.tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_widths_and_order(folders: dict[str, Path], family: str) -> None:
    view = ModelView.open(folders[family])
    grouped = family in GROUPED
    expected = {"kv": KV_HEADS if grouped else HEADS, "rep": HEADS // KV_HEADS if grouped else 1, "hd": HEAD}
    assert [s.address for s in view.sublayers] == [
        f"blocks.{i}.{k}" for i in range(BLOCKS) for k in ("attention", "ffn")
    ]
    assert view.sublayers[2].widths == expected
    experts = {"experts": 4} if family == "mixtral" else {}
    assert view.sublayers[3].widths == {"ffn": NEURONS.get(family, FFN), **experts}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_is_known_where_there_is_one(folders: dict[str, Path], family: str) -> None:
    named = FAMILIES[family][1].endswith("LM") or family in DECODERS
    assert (ModelView.open(folders[family]).head is not None) == named


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_name_units_and_the_tensors_they_own(folders: dict[str, Path], family: str) -> None:
    view = ModelView.open(folders[family])
    (blocks,) = view.groups("blocks")
    assert blocks.units == tuple(f"blocks.{i}" for i in range(BLOCKS))
    assert len(blocks.members[1]) == sum(len(s.tensors) for s in view.blocks[1].sublayers)
    neurons = view.groups("neurons")
    assert [group.address for group in neurons] == [f"blocks.{i}.ffn.neurons" for i in range(BLOCKS)]
    assert all(any("ffn" in dim for dim in ref.layout) for ref in neurons[0].members[0])
    assert len(neurons[1].units) == NEURONS.get(family, FFN)


def test_experts_of_a_block_compete_and_own_their_tensors(folders: dict[str, Path]) -> None:
    groups = ModelView.open(folders["qwen3_moe"]).groups("experts")
    assert [group.address for group in groups] == [f"blocks.{i}.ffn.experts" for i in (0, 2, 3)]
    assert groups[1].units == tuple(f"blocks.2.ffn.experts.{i}" for i in range(4))
    assert sorted(ref.name.removeprefix("model.layers.2.mlp.") for ref in groups[1].members[0])[-1] == "gate.weight"
    assert len(groups[1].members[0]) == 1 + 4 * 3
    with pytest.raises(StructureError, match="`llama` has no experts"):
        ModelView.open(folders["llama"]).groups("experts")


def test_expert_that_the_configuration_does_not_know_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StructureError) as caught:
        ModelView.open(changed(folders["mixtral"], tmp_path / "m", num_local_experts=3))
    assert "block 0 3 experts" in caught.value.why


def test_query_heads_of_plain_attention_point_to_kv_groups(folders: dict[str, Path]) -> None:
    with pytest.raises(StructureError) as caught:
        ModelView.open(folders["bert"]).groups("query_heads")
    assert "kv_groups" in caught.value.hint


def changed(folder: Path, target: Path, **config: object) -> Path:
    shutil.copytree(folder, target)
    found = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**found, **config}))
    return target


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "lama"}, "unknown architecture `lama`"),
        ({"num_hidden_layers": 3}, "unexpected tensor"),
        ({"num_hidden_layers": 5}, "block 4 lacks"),
        ({"intermediate_size": 40}, "has the wrong shape"),
        ({"num_attention_heads": 8}, "has the wrong shape"),
        ({"num_attention_heads": 5}, "do not divide"),
        ({"hidden_size": "32"}, "must be a whole number"),
        ({"hidden_size": 0}, "must be a whole number"),
    ],
)
def test_configuration_of_another_model_is_refused(
    folders: dict[str, Path], tmp_path: Path, config: dict[str, object], words: str
) -> None:
    with pytest.raises(StructureError, match=words):
        ModelView.open(changed(folders["llama"], tmp_path / "m", **config))


def test_tensor_nobody_knows_is_refused_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = changed(folders["llama"], tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.adapter.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(StructureError, match=r"model\.adapter\.weight"):
        ModelView.open(folder)


def test_names_without_the_model_prefix_and_mask_buffers_are_understood(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = changed(folders["gpt2"], tmp_path / "m")
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(folder / "model.safetensors").items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, folder / "model.safetensors")
    view = ModelView.open(folder)
    assert len(view.sublayers) == 2 * BLOCKS
    assert view.arch.renumbered("h.3.mlp.c_fc.weight", 1) == "h.1.mlp.c_fc.weight"


def test_a_model_type_is_described_once() -> None:
    assert set(FAMILIES) <= set(architectures())
    assert architecture("prunekit_llama") is architecture("llama")


def test_gated_ffn_of_dinov2_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match=r"unexpected tensor `encoder\.layer\.0\.mlp\.weights_in"):
        ModelView.open(write_tiny("dinov2", tmp_path, use_swiglu_ffn=True))


def test_numbers_of_heads_that_are_left_must_fit(tmp_path: Path) -> None:
    folder = write_tiny("mpnet", tmp_path / "m")
    layers = {"01": {"num_attention_heads": 2, "num_key_value_heads": 2, "kept_heads": [1, 4]}}
    section = {"schema": 1, "base_model_type": "mpnet", "per_layer_config": layers}
    with pytest.raises(StructureError, match="heads of block 1 are not known"):
        ModelView.open(changed(folder, tmp_path / "n", model_type="prunekit_mpnet", prunekit=section))


def test_width_of_the_projection_before_electras_blocks_counts_as_compute(folders: dict[str, Path]) -> None:
    projection = ModelView.open(folders["electra"]).projection
    assert projection is not None
    assert projection.shape == (32, 16)
