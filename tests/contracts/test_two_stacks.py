"""Models with an encoder and a decoder: a cut folder computes what the dense model with the removed parts masked does."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prunekit.core.files import atomic_folder
from prunekit.modeling.load import load_model
from prunekit.plan.layout import Layout, choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import WIDTHS, ModelView
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
    **dict.fromkeys(
        ("t5", "mt5"),
        {
            "encoder": ("encoder.block", {**_T5, "ffn": "layer.1.DenseReluDense.wo"}),
            "decoder": ("decoder.block", {**_T5, "ffn": "layer.2.DenseReluDense.wo"}),
        },
    ),
}


@pytest.fixture(scope="module", params=list(TWO_STACKS))
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


@pytest.mark.parametrize("seed", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
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
