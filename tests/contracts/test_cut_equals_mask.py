"""A cut folder computes what the dense model computes with the removed parts masked, in every family and layout."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prunekit.cli._families_page import possible_cuts
from prunekit.core.errors import PlanError
from prunekit.core.files import atomic_folder
from prunekit.core.recipe_model import Budget
from prunekit.modeling.load import load_model
from prunekit.plan.allocate import allocate
from prunekit.plan.budget import Scored
from prunekit.plan.layout import Layout, choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.architecture import architectures
from prunekit.structure.parts import HIDDEN, WIDTHS
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.contracts.test_hidden_cut import LAYER, RMS
from tests.contracts.test_two_stacks import CUTS as STACK_CUTS
from tests.tiny import (
    DECODERS,
    EXPERTS,
    FAMILIES,
    GROUPED,
    HEAD,
    PARALLEL,
    TWO_STACKS,
    dinov2_linears,
    tiny_inputs,
    tiny_model,
    write_tiny,
)

# float64 both times, the same sums in another order.
TOLERANCE = 1e-10
BERTS = ("bert", "roberta", "xlm-roberta", "electra")
POST_NORM = (*BERTS, "mpnet", "distilbert")
PRE_NORM = tuple(family for family in FAMILIES if family not in (*POST_NORM, *PARALLEL))
CUTS = ("blocks", "sublayers", "kv_groups", "query_heads", "neurons", "experts", "mixture")
DEPTH = {"llama": "num_hidden_layers", "gpt2": "n_layer"}
# Routers work in float32, and a sum over fewer experts rounds otherwise.
ROUTED = 1e-5
# Blocks, output matrices of attention and FFN, and the dimension of those matrices that heads and neurons enter by.
PLACES = {
    **dict.fromkeys(GROUPED, ("model.layers", "self_attn.o_proj", "mlp.down_proj", 1)),
    "llava": ("model.language_model.layers", "self_attn.o_proj", "mlp.down_proj", 1),
    "qwen2_vl": ("model.language_model.layers", "self_attn.o_proj", "mlp.down_proj", 1),
    "qwen2_5_vl": ("model.language_model.layers", "self_attn.o_proj", "mlp.down_proj", 1),
    "smolvlm": ("model.text_model.layers", "self_attn.o_proj", "mlp.down_proj", 1),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h", 1),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2", 1),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj", 0),
    "bert": ("encoder.layer", "attention.output.dense", "output.dense", 1),
    "roberta": ("roberta.encoder.layer", "attention.output.dense", "output.dense", 1),
    "xlm-roberta": ("encoder.layer", "attention.output.dense", "output.dense", 1),
    "electra": ("electra.encoder.layer", "attention.output.dense", "output.dense", 1),
    "mpnet": ("encoder.layer", "attention.attn.o", "output.dense", 1),
    "distilbert": ("distilbert.transformer.layer", "attention.out_lin", "ffn.lin2", 1),
    "modernbert": ("model.layers", "attn.Wo", "mlp.Wo", 1),
    "vit": ("vit.layers", "attention.o_proj", "mlp.fc2", 1),
    "deit": ("deit.layers", "attention.o_proj", "mlp.fc2", 1),
    "dinov2": ("encoder.layer", dinov2_linears()[3], "mlp.fc2", 1),
    "videomae": ("videomae.encoder.layer", "attention.output.dense", "output.dense", 1),
    **{
        f"{tower}_model": ("encoder.layers", "self_attn.out_proj", "mlp.fc2", 1)
        for tower in ("clip_vision", "clip_text", "siglip_vision", "siglip_text")
    },
}
# Of post-norm families: the norms of both sub-layers.
NORMS = {
    **dict.fromkeys(BERTS, ("attention.output.LayerNorm", "output.LayerNorm")),
    "mpnet": ("attention.LayerNorm", "output.LayerNorm"),
    "distilbert": ("sa_layer_norm", "output_layer_norm"),
}


@pytest.fixture(scope="module", params=list(FAMILIES))
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelView]:
    """Family and structure of a tiny model with float32 weights."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, ModelView.open(write_tiny(request.param, folder / "dense"))


def random_plan(view: ModelView, cut: str, seed: int) -> Plan:
    """Removes random units of a kind, or a bit of each."""
    draw = random.Random(f"{cut} {seed}")
    drop: set[str] = set()
    keep: dict[str, list[int]] = {}
    if cut in ("blocks", "mixture"):
        drop |= {s.address for s in draw.choice(view.blocks).sublayers}
    if cut in ("sublayers", "mixture"):
        drop |= {s.address for s in draw.sample(view.sublayers, 2)}
    for kind, (owner, axis) in WIDTHS.items():
        for sublayer in view.sublayers:
            width = sublayer.widths.get(axis, 1)
            least = view.active_experts if kind == "experts" else 1
            narrowed = cut == kind or (cut == "mixture" and draw.random() < 0.5 and kind not in view.arch.fixed)
            if narrowed and sublayer.kind == owner and sublayer.address not in drop and width > 1:
                keep[f"{sublayer.address}.{kind}"] = sorted(draw.sample(range(width), draw.randint(least, width)))
    return Plan.make(view, drop, keep)


def masked_outputs(family: str, view: ModelView, plan: Plan) -> torch.Tensor:
    """What the dense model gives with the removed parts masked; knows nothing of prunekit's structure files."""
    model_class = getattr(transformers, FAMILIES[family][1])
    options = {"experts_implementation": "eager"} if family in EXPERTS else {}
    model = model_class.from_pretrained(view.checkpoint.folder, dtype=torch.float64, **options).eval()
    blocks, attention, ffn, dim = PLACES[family]
    for index, block in enumerate(model.get_submodule(blocks)):
        for kind, output in (("attention", attention), ("ffn", ffn)):
            address = f"blocks.{index}.{kind}"
            if kind == "ffn" and hasattr(block.mlp if family in EXPERTS else block, "experts"):
                mask_experts(block.mlp, plan, address)
            elif address in plan.drop:
                remove(block, kind, output, family)
            else:
                keep_inputs(block.get_submodule(output), dim, entering(view, plan, address))
    with torch.no_grad():
        return model(**tiny_inputs(family))[0]


def remove(block: torch.nn.Module, kind: str, output: str, family: str) -> None:
    """Takes a sub-layer's contribution out of the residual stream; with its norm where that follows the sum."""
    if not getattr(block, "do_layer_norm_before", True):
        norm = "self_attn_layer_norm" if kind == "attention" else "final_layer_norm"
        block.get_submodule(norm).register_forward_hook(lambda _, given, __: given[0])
    for parameter in block.get_submodule(output).parameters():
        parameter.data.zero_()
    if family in POST_NORM:
        norm = block.get_submodule(NORMS[family][kind == "ffn"])
        norm.register_forward_hook(lambda _, given, __: given[0])


def mask_experts(moe: Any, plan: Plan, address: str) -> None:
    """Takes experts from the choice of the router, and neurons or all from those that are left."""
    if address in plan.drop:
        moe.experts.down_proj.data.zero_()
    neurons = plan.keep.get(f"{address}.neurons")
    if neurons is not None:
        gone = sorted(set(range(moe.experts.down_proj.shape[2])) - set(neurons))
        moe.experts.down_proj.data[:, :, gone] = 0
    kept = plan.keep.get(f"{address}.experts")
    if kept is not None:
        moe.gate.register_forward_hook(lambda router, _, found: chosen(router, found[0], kept))


def chosen(router: Any, logits: torch.Tensor, kept: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """What a router gives when only some experts can be chosen."""
    open_logits = torch.full_like(logits, -torch.inf)
    open_logits[:, list(kept)] = logits[:, list(kept)]
    weights, indices = open_logits.float().softmax(-1).topk(router.top_k)
    if getattr(router, "norm_topk_prob", True):
        weights = weights / weights.sum(-1, keepdim=True)
    return open_logits, weights.to(logits.dtype), indices


def entering(view: ModelView, plan: Plan, address: str) -> list[int] | None:
    """Inputs of an output matrix that stay: neurons, or the numbers of the heads that stay."""
    if address.endswith("ffn"):
        return plan.keep.get(f"{address}.neurons")  # type: ignore[return-value]
    kv, rep = (view.sublayer(address).widths[axis] for axis in ("kv", "rep"))
    groups = plan.keep.get(f"{address}.kv_groups", range(kv))
    heads = plan.keep.get(f"{address}.query_heads", range(rep))
    return [(g * rep + h) * HEAD + i for g in groups for h in heads for i in range(HEAD)]


def keep_inputs(matrix: Any, dim: int, kept: list[int] | None) -> None:
    if kept is not None:
        mask = torch.zeros(matrix.weight.shape[dim], dtype=matrix.weight.dtype)
        mask[list(kept)] = 1
        matrix.weight.data *= mask if dim == 1 else mask[:, None]


def cut(view: ModelView, plan: Plan, target: Path, layout: str = "auto", shard_bytes: int = 10**9) -> Layout:
    with atomic_folder(target) as folder:
        return engine.apply(view, plan, folder, shard_bytes, layout=choose_layout(view, plan, layout))


def outputs(folder: Path, family: str) -> torch.Tensor:
    model = load_model(folder, "float64")
    with torch.no_grad():
        return model(**tiny_inputs(family))[0]


def require_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CUTS)
def test_cut_equals_mask(dense: tuple[str, ModelView], kind: str, seed: int, tmp_path: Path) -> None:
    family, view = dense
    if kind == "query_heads" and family not in GROUPED:
        pytest.skip("every query head has a key and a value of its own")
    if kind == "experts" and family not in EXPERTS:
        pytest.skip("no experts")
    if kind in view.arch.fixed:
        with pytest.raises(PlanError, match="cannot be narrowed"):
            random_plan(view, kind, seed)
        return
    plan = random_plan(view, kind, seed)
    layout = cut(view, plan, tmp_path / "cut")
    expected = masked_outputs(family, view, plan)
    tolerance = ROUTED if family in EXPERTS else TOLERANCE
    require_same(outputs(tmp_path / "cut", family), expected, tolerance)
    if layout.kind != "heterogeneous":
        cut(view, plan, tmp_path / "own class", "heterogeneous")
        require_same(outputs(tmp_path / "own class", family), expected, tolerance)


def test_pairs_that_the_families_page_counts_are_those_compared_here() -> None:
    """Those of hidden channels are in test_hidden_cut.py, those of two stacks in test_two_stacks.py."""
    only = {"query_heads": GROUPED, "experts": EXPERTS}
    compared = {
        (family, kind)
        for family in FAMILIES
        for kind in CUTS
        if kind != "mixture" and family in only.get(kind, FAMILIES) and kind not in architectures()[family].fixed
    }
    compared |= {(family, HIDDEN) for family in (*RMS, *LAYER)}
    # Cross-attentions are sub-layers.
    compared |= {(family, kind) for family in TWO_STACKS for kind in {*STACK_CUTS} - {"mixture", "cross_attention"}}
    assert sorted(compared) == sorted(possible_cuts())


@pytest.mark.parametrize("family", PRE_NORM)
def test_repacked_equals_mask(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    plan = Plan.make(view, ("blocks.1.ffn", "blocks.2.attention"))
    layout = cut(view, plan, tmp_path / "cut")
    assert (layout.kind, layout.pairs) == ("repacked", ((0, 0), (1, 2), (3, 3)))
    require_same(outputs(tmp_path / "cut", family), masked_outputs(family, view, plan))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_alternating_removals_repack_to_what_blocks_that_differ_compute(family: str, tmp_path: Path) -> None:
    """Random scores of single sub-layers, pairs of neighbours removed: half a block apart too."""
    view = ModelView.open(write_tiny(family, tmp_path / "dense", **{DEPTH[family]: 6}))
    kinds = set()
    for seed in range(6):
        draw = random.Random(seed)
        group = view.groups("sublayers")[0]
        scored = Scored(group, [draw.random() for _ in group.units])
        budget = Budget(units=draw.choice([2, 4, 6]), keep_alternating=True)
        plan = allocate(view, view, "sublayers", [scored], budget)
        kinds.add(cut(view, plan, tmp_path / f"repacked {seed}").kind)
        cut(view, plan, tmp_path / f"own class {seed}", "heterogeneous")
        expected = masked_outputs(family, view, plan)
        require_same(outputs(tmp_path / f"repacked {seed}", family), expected)
        require_same(outputs(tmp_path / f"own class {seed}", family), expected)
    assert "repacked" in kinds
    assert "heterogeneous" not in kinds


@pytest.mark.parametrize("family", PARALLEL)
def test_parallel_sublayers_are_not_repacked(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    plan = Plan.make(view, ("blocks.1.ffn", "blocks.2.attention"))
    assert cut(view, plan, tmp_path / "cut").kind == "heterogeneous"
    require_same(outputs(tmp_path / "cut", family), masked_outputs(family, view, plan))


def test_neox_without_parallel_sublayers_is_repacked(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("gpt_neox", tmp_path / "dense", use_parallel_residual=False))
    plan = Plan.make(view, ("blocks.1.ffn", "blocks.2.attention"))
    assert cut(view, plan, tmp_path / "cut").kind == "repacked"
    require_same(outputs(tmp_path / "cut", "gpt_neox"), masked_outputs("gpt_neox", view, plan))


@pytest.mark.parametrize("kind", [kind for kind in CUTS if kind not in ("query_heads", "experts")])
def test_opt_with_norms_after_the_sum(kind: str, tmp_path: Path) -> None:
    changes = {"do_layer_norm_before": False, "word_embed_proj_dim": 32}
    view = ModelView.open(write_tiny("opt", tmp_path / "dense", **changes))
    assert view.norm == "post"
    plan = random_plan(view, kind, 0)
    assert cut(view, plan, tmp_path / "cut").kind == ("stock" if kind == "blocks" else "heterogeneous")
    require_same(outputs(tmp_path / "cut", "opt"), masked_outputs("opt", view, plan))


@pytest.mark.parametrize("family", GROUPED)
def test_equal_widths_give_a_stock_model(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    keep: dict[str, tuple[int, ...]] = {}
    for i in range(1, 4):
        width = view.sublayer(f"blocks.{i}.ffn").widths["ffn"]
        keep |= {f"blocks.{i}.ffn.neurons": tuple(range(i, i + width - 8))}
        if "experts" in view.sublayer(f"blocks.{i}.ffn").widths:
            keep[f"blocks.{i}.ffn.experts"] = (0, 1 + i % 3, 3) if i % 3 != 2 else (1, 2, 3)
        if "query_heads" in view.arch.stock_widths:
            keep |= {f"blocks.{i}.attention.query_heads": (i % 2,)}
    plan = Plan.make(view, ("blocks.0.attention", "blocks.0.ffn"), keep)
    assert cut(view, plan, tmp_path / "cut").kind == "stock"
    tolerance = ROUTED if family in EXPERTS else TOLERANCE
    require_same(outputs(tmp_path / "cut", family), masked_outputs(family, view, plan), tolerance)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_stock_widths_are_those_that_a_stock_model_can_have(family: str, tmp_path: Path) -> None:
    """What docs/reference/families.md says of each width."""
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    for kind, (_, axis) in WIDTHS.items():
        narrowed = [s for s in view.sublayers if s.widths.get(axis, 1) > 1 and kind not in view.arch.fixed]
        if narrowed:
            plan = Plan.make(view, keep={f"{s.address}.{kind}": range(s.widths[axis] // 2) for s in narrowed})
            expected = "stock" if kind in view.arch.stock_widths else "heterogeneous"
            assert (kind, choose_layout(view, plan).kind) == (kind, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "mpnet"])
def test_cutting_twice_equals_cutting_once(family: str, tmp_path: Path) -> None:
    """The second plan is for the first one's result and counts what that has left."""
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    kept = {"blocks.1.ffn.neurons": (3, 5, 7, 9), "blocks.2.attention.kv_groups": (0, 1)}
    first = Plan.make(view, ("blocks.0.attention", "blocks.3.ffn"), kept)
    cut(view, first, tmp_path / "once")
    halfway = ModelView.open(tmp_path / "once")
    kept = {"blocks.1.ffn.neurons": (1, 2), "blocks.2.attention.kv_groups": (1,), "blocks.0.ffn.neurons": (0, 8)}
    cut(halfway, Plan.make(halfway, ("blocks.3.attention",), kept), tmp_path / "twice")
    kept = {"blocks.1.ffn.neurons": (5, 7), "blocks.2.attention.kv_groups": (1,), "blocks.0.ffn.neurons": (0, 8)}
    whole = Plan.make(view, (*first.drop, "blocks.3.attention"), kept)
    require_same(outputs(tmp_path / "twice", family), masked_outputs(family, view, whole))
    cut(view, whole, tmp_path / "at once")
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "at once" / "config.json").read_text()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_heterogeneous_model_becomes_stock_when_what_differs_goes(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    cut(view, Plan.make(view, ("blocks.1.attention",)), tmp_path / "once")
    halfway = ModelView.open(tmp_path / "once")
    assert cut(halfway, Plan.make(halfway, ("blocks.1.ffn",)), tmp_path / "twice").kind == "stock"
    plan = Plan.make(view, ("blocks.1.attention", "blocks.1.ffn"))
    require_same(outputs(tmp_path / "twice", family), masked_outputs(family, view, plan))
    cut(view, plan, tmp_path / "at once")
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "at once" / "config.json").read_text()


def test_gpt2_scale_by_block_number_survives(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("gpt2", tmp_path / "dense", scale_attn_by_inverse_layer_idx=True))
    plan = Plan.make(view, ("blocks.1.attention", "blocks.1.ffn"))
    assert cut(view, plan, tmp_path / "cut").kind == "heterogeneous"
    require_same(outputs(tmp_path / "cut", "gpt2"), masked_outputs("gpt2", view, plan))


@pytest.mark.parametrize("every", [None, 2, 3])
def test_modernbert_keeps_windows_where_they_were(every: int | None, tmp_path: Path) -> None:
    """Stored configurations list the blocks with a window, or say that every so many blocks have none."""
    dense = write_tiny("modernbert", tmp_path / "dense", num_hidden_layers=6)
    config = json.loads((dense / "config.json").read_text())
    if every is not None:
        del config["layer_types"]
        (dense / "config.json").write_text(json.dumps(config | {"global_attn_every_n_layers": every}))
    view = ModelView.open(dense)
    plan = Plan.make(view, ("blocks.1.ffn", "blocks.2.attention", "blocks.4.attention", "blocks.4.ffn"))
    assert cut(view, plan, tmp_path / "cut").kind == "repacked"
    require_same(outputs(tmp_path / "cut", "modernbert"), masked_outputs("modernbert", view, plan))
    found = json.loads((tmp_path / "cut" / "config.json").read_text())
    names = {"F": "full_attention", "S": "sliding_attention"}
    assert found["layer_types"] == [names[letter] for letter in {2: "FSSS"}.get(every or 3, "FSFS")]
    assert found["global_attn_every_n_layers"] == {2: 4}.get(every or 3, 2)


def test_modernbert_without_its_first_attention_is_heterogeneous(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("modernbert", tmp_path / "dense"))
    plan = Plan.make(view, ("blocks.0.attention", "blocks.0.ffn"))
    layout = cut(view, plan, tmp_path / "cut")
    assert (layout.kind, layout.reason) == (
        "heterogeneous",
        "the stock class has no norm before its first attention, others have",
    )
    require_same(outputs(tmp_path / "cut", "modernbert"), masked_outputs("modernbert", view, plan))


def test_backbone_that_hands_out_inner_blocks_keeps_them(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("dinov2", tmp_path / "dense", out_indices=[2, 4]))
    plan = Plan.make(view, ("blocks.1.attention", "blocks.1.ffn"))
    layout = cut(view, plan, tmp_path / "cut")
    assert (layout.kind, layout.reason) == ("heterogeneous", "`out_indices` [2, 4] would name other blocks")
    require_same(outputs(tmp_path / "cut", "dinov2"), masked_outputs("dinov2", view, plan))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shards_make_no_difference(family: str, tmp_path: Path) -> None:
    tiny_model(family, dtype=torch.float32).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    view = ModelView.open(tmp_path / "dense")
    plan = random_plan(view, "mixture", 0)
    cut(view, plan, tmp_path / "cut", shard_bytes=10_000)
    assert len(list((tmp_path / "dense").glob("model-*"))) > 1
    assert len(list((tmp_path / "cut").glob("model-*"))) > 1
    require_same(outputs(tmp_path / "cut", family), masked_outputs(family, view, plan))


@pytest.mark.parametrize("family", DECODERS)
def test_bfloat16_stays_bfloat16(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "dense", dtype=torch.bfloat16))
    plan = random_plan(view, "mixture", 1)
    cut(view, plan, tmp_path / "cut")
    assert {info.dtype for info in ModelView.open(tmp_path / "cut").checkpoint.tensors.values()} == {"BF16"}
    require_same(outputs(tmp_path / "cut", family), masked_outputs(family, view, plan))


def test_input_is_left_as_it_was(dense: tuple[str, ModelView], tmp_path: Path) -> None:
    def digests() -> dict[str, str]:
        files = view.checkpoint.folder.iterdir()
        return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    _, view = dense
    before = digests()
    cut(view, random_plan(view, "mixture", 2), tmp_path / "cut")
    assert digests() == before
