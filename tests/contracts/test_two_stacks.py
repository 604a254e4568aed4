"""Models with an encoder and a decoder: a cut folder computes what the dense one with removed parts masked does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prunekit.core.errors import PlanError, StructureError, UsageError
from prunekit.core.files import atomic_folder
from prunekit.core.recipe import parse_recipe
from prunekit.modeling.load import load_model
from prunekit.pipeline.pattern import check_pattern
from prunekit.plan.layout import Layout, choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.parts import WIDTHS
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import HEAD, TWO_STACKS, tiny_inputs, tiny_model, write_tiny

# float64 both times, the same sums in another order.
TOLERANCE = 1e-10
CUTS = ("blocks", "sublayers", "cross_attention", "kv_groups", "neurons", "mixture")
# Where blocks are, and the output matrices of the sub-layers in a block of each stack.
_WHISPER = {"attention": "self_attn.out_proj", "cross_attention": "encoder_attn.out_proj", "ffn": "fc2"}
_T5 = {"attention": "layer.0.SelfAttention.o", "cross_attention": "layer.1.EncDecAttention.o"}
PLACES = {
    "whisper": {stack: (f"model.{stack}.layers", _WHISPER) for stack in ("encoder", "decoder")},
    **{
        family: {
            "encoder": ("encoder.block", {**_T5, "ffn": "layer.1.DenseReluDense.wo"}),
            "decoder": ("decoder.block", {**_T5, "ffn": "layer.2.DenseReluDense.wo"}),
        }
        for family in ("t5", "mt5")
    },
}


# mT5 is T5 with a gated FFN under other class names.
SLOW = ("mt5",)


@pytest.fixture(
    scope="module",
    params=[pytest.param(family, marks=[pytest.mark.slow] * (family in SLOW)) for family in TWO_STACKS],
)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ModelView]:
    """Family and structure of a tiny model with float32 weights."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, ModelView.open(write_tiny(request.param, folder / "dense"))


def random_plan(view: ModelView, cut: str, seed: int) -> Plan:
    """Removes random units of a kind from both stacks, or a bit of each."""
    draw = random.Random(f"{cut} {seed}")
    drop: set[str] = set()
    keep: dict[str, list[int]] = {}
    if cut in ("blocks", "mixture"):
        for stack in ("encoder", "decoder"):
            drop |= {s.address for s in draw.choice([b for b in view.blocks if b.stack == stack]).sublayers}
    if cut in ("sublayers", "mixture"):
        drop |= {s.address for s in draw.sample(view.sublayers, 4)}
    if cut == "cross_attention":
        drop |= set(draw.sample(view.groups(cut)[0].units, 2))
    for kind in ("kv_groups", "neurons"):
        for sublayer in view.sublayers:
            width = sublayer.widths.get(WIDTHS[kind][1], 1)
            narrowed = cut == kind or (cut == "mixture" and draw.random() < 0.5)
            if narrowed and sublayer.role == WIDTHS[kind][0] and sublayer.address not in drop:
                keep[f"{sublayer.address}.{kind}"] = sorted(draw.sample(range(width), draw.randint(1, width)))
    return Plan.make(view, drop, keep)


def masked(family: str, view: ModelView, plan: Plan, dtype: torch.dtype = torch.float64) -> Any:
    """The dense model with the removed parts masked; knows nothing of prunekit's structure files."""
    model_class = getattr(transformers, TWO_STACKS[family][1])
    model = model_class.from_pretrained(view.checkpoint.folder, dtype=dtype).eval()
    for stack, (blocks, outputs) in PLACES[family].items():
        for number, block in enumerate(model.get_submodule(blocks)):
            for kind, output in outputs.items():
                address = f"{stack}.blocks.{number}.{kind}"
                if stack == "encoder" and kind == "cross_attention":
                    continue
                matrix: Any = block.get_submodule(output)
                if address in plan.drop:
                    for parameter in matrix.parameters():
                        parameter.data.zero_()
                mask = torch.zeros(matrix.weight.shape[1], dtype=dtype)
                mask[entering(plan, address, len(mask))] = 1
                matrix.weight.data *= mask
    return model


def entering(plan: Plan, address: str, width: int) -> list[int]:
    """Inputs of an output matrix that stay."""
    if address.endswith("ffn"):
        return list(plan.keep.get(f"{address}.neurons", range(width)))
    heads = plan.keep.get(f"{address}.kv_groups", range(width // HEAD))
    return [head * HEAD + i for head in heads for i in range(HEAD)]


def outputs(model: Any, family: str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tiny_inputs(family))[0]
    return found


def cut(view: ModelView, plan: Plan, target: Path, layout: str = "auto") -> Layout:
    with atomic_folder(target) as folder:
        return engine.apply(view, plan, folder, layout=choose_layout(view, plan, layout))


def require_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def generated(model: Any, family: str, use_cache: bool) -> list[list[int]]:
    """Greedy tokens after a prompt of three, without early ends."""
    inputs = tiny_inputs(family)
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :3]
    name = "input_features" if family == "whisper" else "input_ids"
    with torch.no_grad():
        # Not Whisper's own loop over windows of 30 seconds, which adds tokens of its own.
        made = transformers.GenerationMixin.generate(
            model,
            inputs[name],
            decoder_input_ids=inputs["decoder_input_ids"],
            min_new_tokens=6,
            max_new_tokens=6,
            do_sample=False,
            use_cache=use_cache,
        )
    tokens: list[list[int]] = made.tolist()
    return tokens


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", CUTS)
def test_cut_equals_mask(dense: tuple[str, ModelView], kind: str, seed: int, tmp_path: Path) -> None:
    family, view = dense
    plan = random_plan(view, kind, seed)
    layout = cut(view, plan, tmp_path / "cut")
    expected = outputs(masked(family, view, plan), family)
    assert not torch.allclose(expected, outputs(masked(family, view, Plan.make(view)), family))
    found = load_model(tmp_path / "cut", "float64")
    require_same(outputs(found, family), expected)
    assert generated(found, family, True) == generated(found, family, False)
    if layout.kind != "heterogeneous":
        assert type(found).__name__ == TWO_STACKS[family][1]
        cut(view, plan, tmp_path / "own class", "heterogeneous")
        require_same(outputs(load_model(tmp_path / "own class", "float64"), family), expected)


def changed_config(folder: Path, **changes: Any) -> ModelView:
    """The model of a folder whose configuration was changed by hand; None takes a key out."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return ModelView.open(folder)


def blocks(*addresses: str) -> list[str]:
    """Sub-layers of whole blocks, such as `decoder.blocks.0`."""
    kinds = {"encoder": ("attention", "ffn"), "decoder": ("attention", "cross_attention", "ffn")}
    return [f"{address}.{kind}" for address in addresses for kind in kinds[address.partition(".")[0]]]


@pytest.mark.parametrize("layout", ["stock", "heterogeneous"])
def test_first_blocks_can_go(dense: tuple[str, ModelView], layout: str, tmp_path: Path) -> None:
    """T5's blocks share the position bias that is stored with the first of each stack."""
    family, view = dense
    plan = Plan.make(view, blocks("encoder.blocks.0", "decoder.blocks.0"))
    assert cut(view, plan, tmp_path / "cut", layout).kind == layout
    found = load_model(tmp_path / "cut", "float64")
    require_same(outputs(found, family), outputs(masked(family, view, plan), family))
    assert generated(found, family, True) == generated(found, family, False)


def test_first_attentions_can_lose_heads_or_go(dense: tuple[str, ModelView], tmp_path: Path) -> None:
    family, view = dense
    whole = {"decoder.blocks.1.attention.kv_groups": (1, 2), "decoder.blocks.1.cross_attention.kv_groups": (0, 3)}
    narrowed = {
        "encoder.blocks.0.attention.kv_groups": (1, 3),
        "decoder.blocks.0.attention.kv_groups": (3,),
        "decoder.blocks.0.cross_attention.kv_groups": (0, 1, 2),
    }
    for plan in (
        Plan.make(view, keep=narrowed),
        Plan.make(view, ("encoder.blocks.0.attention", "decoder.blocks.0.attention"), whole),
    ):
        assert cut(view, plan, tmp_path / str(len(plan.drop))).kind == "heterogeneous"
        found = load_model(tmp_path / str(len(plan.drop)), "float64")
        require_same(outputs(found, family), outputs(masked(family, view, plan), family))
        expected = generated(masked(family, view, plan), family, False)
        assert generated(found, family, True) == generated(found, family, False) == expected


def test_survivors_of_each_stack_are_repacked(dense: tuple[str, ModelView], tmp_path: Path) -> None:
    family, view = dense
    gone = ("encoder.blocks.0.ffn", "encoder.blocks.1.attention")
    plan = Plan.make(
        view, (*gone, "decoder.blocks.0.cross_attention", "decoder.blocks.0.ffn", "decoder.blocks.1.attention")
    )
    layout = cut(view, plan, tmp_path / "cut")
    encoder = sum(block.stack == "encoder" for block in view.blocks)
    assert layout.kind == "repacked"
    assert layout.pairs[0] == (0, 1)
    assert layout.pairs[encoder - 1] == (encoder, encoder + 1, encoder + 1)
    require_same(outputs(load_model(tmp_path / "cut", "float64"), family), outputs(masked(family, view, plan), family))


def test_cutting_twice_equals_cutting_once(dense: tuple[str, ModelView], tmp_path: Path) -> None:
    family, view = dense
    kept = {"encoder.blocks.1.ffn.neurons": (3, 5, 7), "decoder.blocks.1.attention.kv_groups": (1, 2, 3)}
    first = Plan.make(view, ("decoder.blocks.0.cross_attention",), kept)
    cut(view, first, tmp_path / "once")
    halfway = ModelView.open(tmp_path / "once")
    kept = {"encoder.blocks.1.ffn.neurons": (1, 2), "decoder.blocks.1.attention.kv_groups": (0, 2)}
    kept["decoder.blocks.2.cross_attention.kv_groups"] = (2,)
    second = Plan.make(halfway, ("encoder.blocks.0.attention",), kept)
    cut(halfway, second, tmp_path / "twice")
    kept = {**kept, "encoder.blocks.1.ffn.neurons": (5, 7), "decoder.blocks.1.attention.kv_groups": (1, 3)}
    whole = Plan.make(view, (*first.drop, *second.drop), kept)
    cut(view, whole, tmp_path / "at once")
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "at once" / "config.json").read_text()
    require_same(
        outputs(load_model(tmp_path / "twice", "float64"), family), outputs(masked(family, view, whole), family)
    )


def test_stacks_with_keys_of_their_own_are_narrowed_apart(tmp_path: Path) -> None:
    """Whisper's configuration has an FFN width for each stack, T5's one for both."""
    for family, kind in (("whisper", "stock"), ("t5", "heterogeneous")):
        view = ModelView.open(write_tiny(family, tmp_path / family))
        decoder = [s for s in view.sublayers if s.kind == "ffn" and s.address.startswith("decoder")]
        plan = Plan.make(view, keep={f"{s.address}.neurons": range(8, s.widths["ffn"]) for s in decoder})
        assert cut(view, plan, tmp_path / f"{family} cut").kind == kind
        model = load_model(tmp_path / f"{family} cut", "float64")
        require_same(outputs(model, family), outputs(masked(family, view, plan), family))


@pytest.mark.parametrize(
    ("family", "changes"),
    [("whisper", {"num_hidden_layers": 3}), ("t5", {"num_hidden_layers": 4}), ("mt5", {"num_hidden_layers": 4})],
)
def test_depth_under_an_older_name_follows(family: str, changes: dict[str, int], tmp_path: Path) -> None:
    """transformers 4 wrote the encoder's depth twice, and the second one overrides the first."""
    view = changed_config(write_tiny(family, tmp_path / "dense"), **changes)
    plan = Plan.make(view, blocks("encoder.blocks.1"))
    assert cut(view, plan, tmp_path / "cut").kind == "stock"
    require_same(outputs(load_model(tmp_path / "cut", "float64"), family), outputs(masked(family, view, plan), family))


def test_t5_without_a_depth_of_its_decoder(tmp_path: Path) -> None:
    """It is the encoder's then, and must not follow when that changes."""
    folder = write_tiny("t5", tmp_path / "dense", num_layers=3, num_decoder_layers=3)
    view = changed_config(folder, num_decoder_layers=None)
    plan = Plan.make(view, blocks("decoder.blocks.2"))
    assert cut(view, plan, tmp_path / "cut").kind == "stock"
    require_same(outputs(load_model(tmp_path / "cut", "float64"), "t5"), outputs(masked("t5", view, plan), "t5"))


def test_t5_decoder_that_would_be_deeper_than_the_encoder_is_heterogeneous(tmp_path: Path) -> None:
    """transformers makes the KV cache of a stock T5 with as many layers as its encoder has blocks."""
    view = ModelView.open(write_tiny("t5", tmp_path / "dense", num_layers=2, num_decoder_layers=2))
    plan = Plan.make(view, blocks("encoder.blocks.0"))
    layout = cut(view, plan, tmp_path / "cut")
    assert (layout.kind, layout.reason) == (
        "heterogeneous",
        "the class has no KV cache for a decoder that is deeper than the encoder",
    )
    found = load_model(tmp_path / "cut", "float64")
    require_same(outputs(found, "t5"), outputs(masked("t5", view, plan), "t5"))
    assert generated(found, "t5", True) == generated(found, "t5", False)
    with pytest.raises(PlanError, match="cannot be a stock model"):
        choose_layout(view, plan, "stock")


def test_t5_whose_decoder_is_deeper_than_the_encoder_can_lose_blocks_of_it(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("t5", tmp_path / "dense", num_layers=2, num_decoder_layers=3))
    plan = Plan.make(view, blocks("decoder.blocks.1"))
    assert cut(view, plan, tmp_path / "cut").kind == "stock"
    found = load_model(tmp_path / "cut", "float64")
    require_same(outputs(found, "t5"), outputs(masked("t5", view, plan), "t5"))
    assert generated(found, "t5", True) == generated(found, "t5", False)
    with pytest.raises(PlanError, match="cannot have blocks that differ here"):
        choose_layout(view, Plan.make(view, ("decoder.blocks.1.ffn",)))


def test_t5_with_a_head_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    model = tiny_model("t5", dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    view = ModelView.open(folder)
    assert not view.tied
    plan = random_plan(view, "mixture", 0)
    cut(view, plan, tmp_path / "cut")
    require_same(outputs(load_model(tmp_path / "cut", "float64"), "t5"), outputs(masked("t5", view, plan), "t5"))


def test_alignment_heads_follow_their_blocks(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("whisper", tmp_path / "dense"))
    file = tmp_path / "dense" / "generation_config.json"
    heads = [[0, 1], [1, 0], [1, 3], [2, 2], [3, 0]]
    file.write_text(json.dumps({**json.loads(file.read_text()), "alignment_heads": heads}))
    keep = {"decoder.blocks.1.cross_attention.kv_groups": (1, 3)}
    for drop, left in (
        (blocks("decoder.blocks.0"), [[0, 1], [1, 2], [2, 0]]),
        (["decoder.blocks.2.cross_attention"], [[0, 1], [1, 1], [2, 0]]),
        (view.groups("cross_attention")[0].units, None),
    ):
        kept = {} if left is None else keep
        target = tmp_path / str(left)
        cut(view, Plan.make(view, drop, kept), target)
        assert json.loads((target / "generation_config.json").read_text()).get("alignment_heads") == left


def test_kinds_that_are_not_there_are_refused_by_name(dense: tuple[str, ModelView], tmp_path: Path) -> None:
    family, view = dense
    with pytest.raises(StructureError, match="query heads cannot go alone"):
        view.groups("query_heads")
    with pytest.raises(StructureError, match=f"hidden channels of `{family}` cannot be cut"):
        view.groups("hidden")
    with pytest.raises(StructureError, match="`llama` has no cross-attention"):
        ModelView.open(write_tiny("llama", tmp_path / "llama")).groups("cross_attention")


def test_a_pattern_for_two_stacks_is_refused(dense: tuple[str, ModelView]) -> None:
    family, view = dense
    step = {"remove": "blocks", "by": {"score": "last_k"}, "budget": {"units": 1}}
    recipe = parse_recipe({"schema": 1, "model": {"source": family}, "runtime": {"pattern": "dense"}, "steps": [step]})
    with pytest.raises(UsageError, match=f"`runtime` cannot run `{family}`"):
        check_pattern(view, recipe)
