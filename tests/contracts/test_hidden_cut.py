"""A model with fewer hidden channels computes what the dense one computes with those channels at zero.

Root mean squares of the dense model run over all channels, the zeros among them; layer norms run over those that stay.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from prunekit.core.errors import PlanError, StructureError
from prunekit.core.files import atomic_folder
from prunekit.core.recipe_model import Budget
from prunekit.modeling.load import load_model
from prunekit.plan.after import after
from prunekit.plan.allocate import Scored, allocate
from prunekit.plan.cost import cost, unit_cost
from prunekit.plan.layout import Layout, choose_layout
from prunekit.plan.plan import Plan
from prunekit.scores._weights import CheckpointWeights
from prunekit.scores.magnitude import Magnitude
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import BLOCKS, FAMILIES, HIDDEN, tiny_inputs, write_tiny

# Scaled weights are rounded to float32 once; what follows is float64.
TOLERANCE = 2e-5
EXACT = 1e-10
RMS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
LAYER = ("gpt2", "bert", "roberta", "xlm-roberta", "vit", "deit")
# Multiples of four heads.
KEPT = tuple(sorted(torch.randperm(HIDDEN, generator=torch.Generator().manual_seed(5))[:24].tolist()))


def masked_outputs(family: str, view: ModelView) -> torch.Tensor:
    """What the dense model gives with channels at zero; knows nothing of prunekit's structure files."""
    model = getattr(transformers, FAMILIES[family][1]).from_pretrained(view.checkpoint.folder, dtype=torch.float64)
    mask = torch.zeros(HIDDEN, dtype=torch.float64)
    mask[list(KEPT)] = 1
    for name, module in model.eval().named_modules():
        if isinstance(module, torch.nn.LayerNorm) and module.normalized_shape == (HIDDEN,):
            module.forward = narrow_norm(module, mask)  # type: ignore[method-assign]
        elif family in RMS and name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(lambda _, __, found: found * mask)
    with torch.no_grad():
        return model(**tiny_inputs(family))[0]


def narrow_norm(module: Any, mask: torch.Tensor) -> Any:
    def forward(given: torch.Tensor) -> torch.Tensor:
        mean = (given * mask).sum(-1, keepdim=True) / mask.sum()
        variance = ((given - mean).square() * mask).sum(-1, keepdim=True) / mask.sum()
        return ((given - mean) / (variance + module.eps).sqrt() * module.weight + module.bias) * mask

    return forward


def cut(view: ModelView, plan: Plan, target: Path, layout: str = "auto") -> Layout:
    with atomic_folder(target) as folder:
        return engine.apply(view, plan, folder, layout=choose_layout(view, plan, layout))


def outputs(folder: Path, family: str) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, "float64")(**tiny_inputs(family))[0]


@pytest.mark.parametrize("family", [*RMS, *LAYER])
def test_hidden_cut_equals_mask(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    plan = Plan.make(view, keep={"hidden": KEPT})
    layout = cut(view, plan, tmp_path / "cut")
    assert layout.kind == ("stock" if family in RMS else "heterogeneous")
    expected, found = masked_outputs(family, view), outputs(tmp_path / "cut", family)
    if expected.shape[-1] == HIDDEN:
        expected = expected[..., list(KEPT)]
    tolerance = TOLERANCE if family in RMS else EXACT
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    if family in RMS:
        cut(view, plan, tmp_path / "own", "heterogeneous")
        torch.testing.assert_close(outputs(tmp_path / "own", family), found, atol=EXACT, rtol=0)
    assert cost(ModelView.open(tmp_path / "cut")) == cost(view, plan)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_hidden_goes_with_other_cuts_in_two_steps(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    first = Plan.make(view, ("blocks.1.ffn",), {"hidden": KEPT, "blocks.0.ffn.neurons": range(0, 48, 2)})
    cut(view, first, tmp_path / "first", "heterogeneous")
    between = ModelView.open(tmp_path / "first")
    later = Plan.make(between, keep={"hidden": range(0, 24, 2)[:8], "blocks.2.attention.kv_groups": (1,)})
    cut(between, later, tmp_path / "second", "heterogeneous")
    whole = first.then(view, Plan(later.drop, later.keep))
    assert after(view, first).hidden == between.hidden == 24
    cut(view, whole, tmp_path / "at once", "heterogeneous")
    found, expected = outputs(tmp_path / "second", family), outputs(tmp_path / "at once", family)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_untied_head_is_left_as_it_was(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("llama", tmp_path / "dense", tie_word_embeddings=False))
    cut(view, Plan.make(view, keep={"hidden": KEPT}), tmp_path / "cut")
    head, before = (ModelView.open(tmp_path / n).checkpoint.read("lm_head.weight") for n in ("cut", "dense"))
    assert torch.equal(head, before[:, list(KEPT)])
    found, expected = outputs(tmp_path / "cut", "llama"), masked_outputs("llama", view)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_head_width_is_said_and_other_norms_keep_their_epsilon(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("qwen3", tmp_path / "dense"))
    cut(view, Plan.make(view, keep={"hidden": KEPT}), tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["hidden_size"], config["head_dim"], config["rms_norm_eps"]) == (24, 8, 1e-6)


def test_class_that_divides_by_heads_refuses_other_widths(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("llama", tmp_path / "dense"))
    with pytest.raises(PlanError, match="cannot have 25 hidden channels") as caught:
        choose_layout(view, Plan.make(view, keep={"hidden": range(25)}))
    assert caught.value.hint == "use `multiple_of: 4`"


@pytest.mark.parametrize("family", ["gemma2", "electra", "videomae", "opt"])
def test_families_whose_norms_are_not_described_are_refused(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "dense"))
    with pytest.raises(StructureError, match="cannot be cut"):
        Plan.make(view, keep={"hidden": KEPT})


@pytest.mark.parametrize("of", ["params", "flops", "units"])
def test_budget_counts_what_channels_cost(of: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("llama", tmp_path / "dense"))
    (group,) = view.groups("hidden")
    scores = Magnitude().score(group, CheckpointWeights(view.checkpoint), {}).tolist()
    plan = allocate(view, view, "hidden", [Scored(group, scores)], Budget(remove=0.25, of=of, within="group"))
    kept = plan.keep["hidden"]
    assert len(kept) <= 24
    assert min(scores[i] for i in kept) >= max(scores[i] for i in range(HIDDEN) if i not in kept)
    if of == "params":
        before, left = cost(view).block_params, cost(view, plan).block_params
        assert before - left == (HIDDEN - len(kept)) * unit_cost(view, "hidden.0", "params")
        assert before - left >= 0.25 * 0.995 * before > (before - left) - unit_cost(view, "hidden.0", "params")


def test_magnitude_of_a_channel_is_the_mean_over_its_weights(tmp_path: Path) -> None:
    view = ModelView.open(write_tiny("bert", tmp_path / "dense"))
    (group,) = view.groups("hidden")
    found = Magnitude(norm="l1").score(group, CheckpointWeights(view.checkpoint), {})
    model = load_model(tmp_path / "dense", "float64")
    parts = []
    for name, weight in model.state_dict().items():
        if weight.dim() == 2 and name.endswith("weight"):
            rows = weight if name.endswith(("attention.output.dense.weight", "output.dense.weight")) else weight.T
            if name.startswith("pooler"):
                rows = weight
            parts.append(rows)
    expected = torch.cat(parts, 1).abs().mean(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert len(parts) == 3 + 6 * BLOCKS + 1


def test_pooling_of_a_sentence_encoder_follows(tmp_path: Path) -> None:
    folder = write_tiny("bert", tmp_path / "dense")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN}))
    view = ModelView.open(folder)
    cut(view, Plan.make(view, keep={"hidden": KEPT}), tmp_path / "cut")
    assert json.loads((tmp_path / "cut/1_Pooling/config.json").read_text()) == {"word_embedding_dimension": 24}
