"""Diagnostics against closed forms, and on models built so that the answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.calibrate.stack import Stack
from prunekit.core.types import Panel
from prunekit.evaluate.diagnostics._subject import DIAGNOSTICS, Subject
from prunekit.evaluate.diagnostics.activation_norms import ActivationNorms
from prunekit.evaluate.diagnostics.attention_entropy import AttentionEntropy, entropy
from prunekit.evaluate.diagnostics.attention_rank import AttentionRank, effective_rank
from prunekit.evaluate.diagnostics.head_roles import HeadRoles, copy_rate, local_share, repeated, sink_share
from prunekit.evaluate.diagnostics.sensitivity import Sensitivity
from prunekit.evaluate.diagnostics.variance_kurtosis import VarianceKurtosis, kurtosis
from prunekit.modeling.modeling_prunekit import skip
from prunekit.report.diagnosis import diagnosis_table, write_diagnosis
from tests.heterogeneous import without
from tests.tiny import BLOCKS, HEADS, SEQUENTIAL, tiny_inputs, tiny_model

Measure = Callable[..., dict[str, Panel]]


def subject(model: Any, inputs: dict[str, Tensor], decoder: bool = True) -> Subject:
    return Subject(Stack(model), inputs, decoder)


def measured(diagnostic: Any, of: Subject) -> dict[str, Panel]:
    return {panel.name: panel for panel in diagnostic.measure(of)}


def test_uniform_attention_has_entropy_log_n_and_rank_one() -> None:
    uniform = torch.full((3, 7, 7), 1 / 7)
    assert entropy(uniform).allclose(torch.full((3, 7), math.log(7)))
    assert effective_rank(uniform).allclose(torch.ones(3, dtype=torch.float64), atol=1e-5)


def test_identity_has_entropy_zero_and_full_rank() -> None:
    one_hot = torch.eye(7)[None]
    assert entropy(one_hot).abs().max() == 0
    assert effective_rank(one_hot).item() == pytest.approx(7)


def test_rank_counts_directions_by_their_size() -> None:
    # Singular values 3 and 1: shares 3/4 and 1/4.
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0, 0.0]))).item() == pytest.approx(expected)
    assert effective_rank(torch.zeros(3, 3)).item() == 1


@pytest.mark.parametrize("n", [2, 5, 576])
def test_kurtosis_of_one_outlier_among_equals(n: int) -> None:
    values = torch.zeros(n, dtype=torch.float64)
    values[n // 2] = 17.0
    assert kurtosis(values) == pytest.approx((n * n - 3 * n + 3) / (n - 1))


def test_kurtosis_of_two_values_is_one_and_of_equals_undefined() -> None:
    assert kurtosis(torch.tensor([-1.0, 1.0, -1.0, 1.0])) == pytest.approx(1.0)
    assert kurtosis(torch.ones(4)) is None
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert kurtosis(normal) == pytest.approx(3.0, abs=0.05)


def test_shares_of_uniform_causal_attention() -> None:
    n = 9
    rows = torch.ones(n, n).tril()
    uniform = (rows / rows.sum(-1, keepdim=True))[None]
    assert sink_share(uniform).item() == pytest.approx(sum(1 / (i + 1) for i in range(1, n)) / (n - 1))
    # Queries 3 to 8 have keys more than two tokens back; three of their i + 1 keys are near.
    assert local_share(uniform, 2).item() == pytest.approx(sum(3 / (i + 1) for i in range(3, n)) / (n - 3))
    assert local_share(uniform, 50).item() == pytest.approx(1.0)


def test_copying_head_is_found_and_others_are_not() -> None:
    ids = torch.tensor([5, 9, 2, 7, 5, 9, 2, 7])
    heads = torch.zeros(3, 8, 8)
    for query in range(4, 7):
        heads[0, query, query - 4 + 1] = 1.0  # the token after the same one before: what comes next
        heads[1, query, query - 4] = 1.0  # the same token before
        heads[2, query, query] = 1.0
    assert copy_rate(heads, ids).tolist() == [1.0, 0.0, 0.0]


def test_repeated_text_is_random_tokens_twice() -> None:
    of = subject(tiny_model("llama"), tiny_inputs("llama", 2, 16))
    ids = repeated(of, 3)
    assert ids.shape == (3, 16)
    assert torch.equal(ids[:, :8], ids[:, 8:])
    assert all(len(set(row.tolist())) == 8 for row in ids)
    assert torch.equal(ids, repeated(of, 3))


def flat_attention(model: Any) -> Any:
    """The model with queries of zero: every head attends to all keys alike."""
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    return model


def test_model_without_queries_attends_uniformly() -> None:
    n = 12
    of = subject(flat_attention(tiny_model("llama")), tiny_inputs("llama", 2, n))
    panel = measured(AttentionEntropy(), of)["attention_entropy"]
    expected = sum(math.log(i + 1) for i in range(n)) / n
    assert panel.rows == tuple(f"blocks.{b}.attention" for b in range(BLOCKS))
    assert torch.tensor(panel.values).allclose(torch.full((BLOCKS, HEADS), expected), atol=1e-5)
    rows = torch.ones(n, n).tril()
    rank = effective_rank(rows / rows.sum(-1, keepdim=True)).item()
    ranks = measured(AttentionRank(), of)["attention_rank"].values
    assert torch.tensor(ranks).allclose(torch.full((BLOCKS, HEADS), rank), atol=1e-3)


def test_head_made_a_sink_is_the_one_found() -> None:
    """Positions do not turn, one head's queries are constant, and only the first token's key answers them."""
    torch.manual_seed(0)
    model = flat_attention(tiny_model("llama"))
    width = model.config.hidden_size // HEADS
    ids = tiny_inputs("llama", 1, 12)["input_ids"]
    ids[:, 1:] = ids[:, 1:].clamp_min(4)
    ids[:, 0] = 3
    layer = model.model.layers[0].self_attn
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.model.embed_tokens.weight[:, 1] = 0.0
        model.model.embed_tokens.weight[3, 1] = 30.0
        model.model.layers[0].input_layernorm.weight.fill_(1.0)
        layer.q_proj.weight[2 * width, 0] = 50.0
        layer.k_proj.weight[width, :] = 0.0
        layer.k_proj.weight[width, 1] = 50.0
        layer.k_proj.bias[width] = 0.0
    # The first number of a head turns with the position; frequency zero stops that.
    model.model.rotary_emb.inv_freq.zero_()
    panels = measured(HeadRoles(window_tokens=2), subject(model, {"input_ids": ids}))
    shares = torch.tensor(panels["sink"].values)
    assert shares[0, 2] > 0.95
    others = shares.flatten().tolist()
    others.pop(2)
    uniform = sum(1 / (i + 1) for i in range(1, 12)) / 11
    assert others == pytest.approx([uniform] * len(others), abs=1e-4)
    assert panels["sink"].threshold == 0.3


def test_norms_and_kurtosis_are_those_of_the_models_own_hidden_states() -> None:
    model, inputs = tiny_model("llama"), tiny_inputs("llama", 2, 9)
    with torch.no_grad():
        states = model.model(**inputs, output_hidden_states=True).hidden_states
    of = subject(model, inputs)
    panel = measured(ActivationNorms(), of)["activation_norms"]
    assert panel.rows == ("input", *(f"blocks.{b}" for b in range(BLOCKS)))
    # The last of transformers' hidden states is normalised, so it is left out.
    for row, state in list(zip(panel.values, states, strict=True))[:-1]:
        lengths = state.norm(dim=-1)
        assert row == pytest.approx((lengths.mean().item(), lengths.max().item()), rel=1e-5)
    found = measured(VarianceKurtosis(), of)["variance_kurtosis"]
    for (value,), state in list(zip(found.values, states, strict=True))[:-1]:
        assert value == pytest.approx(kurtosis(state.flatten(0, 1).var(0, unbiased=False)), rel=1e-4)


def test_sensitivity_is_the_distance_of_the_model_without_the_sublayer() -> None:
    inputs = tiny_inputs("llama", 2, 9)
    panel = measured(Sensitivity(distance="kl"), subject(tiny_model("llama"), inputs))["sensitivity"]
    with torch.no_grad():
        dense = tiny_model("llama")(**inputs).logits.log_softmax(-1)
        for block, kind in ((0, "attention"), (2, "ffn")):
            cut = tiny_model("llama")
            skip(cut.model.layers[block], kind)
            logs = cut(**inputs).logits.log_softmax(-1)
            expected = (dense.exp() * (dense - logs)).sum(-1).mean().item()
            assert panel.values[block][panel.columns.index(kind)] == pytest.approx(expected, rel=1e-6)


def test_padding_does_not_count() -> None:
    model = tiny_model("bert")
    ids = tiny_inputs("bert", 1, 9)["input_ids"]
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], 1),
        "attention_mask": torch.tensor([[1] * 9 + [0] * 5]),
    }
    for name in ("attention_entropy", "attention_rank", "head_roles", "activation_norms"):
        diagnostic = DIAGNOSTICS.get(name)()
        alone, beside = (measured(diagnostic, subject(model, x, False)) for x in ({"input_ids": ids}, padded))
        for key, panel in alone.items():
            assert torch.tensor(panel.values).allclose(torch.tensor(beside[key].values), atol=1e-5), key


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_every_diagnostic_measures_every_family(family: str, tmp_path: Path) -> None:
    decoder = family not in ("bert", "vit")
    of = subject(tiny_model(family), tiny_inputs(family, 2, 10), decoder)
    panels = [panel for name in DIAGNOSTICS.names() for panel in DIAGNOSTICS.get(name)().measure(of)]
    for panel in panels:
        assert all(len(row) == len(panel.columns) for row in panel.values)
        assert len(panel.values) == len(panel.rows) >= BLOCKS
        assert all(math.isfinite(value) for row in panel.values for value in row)
    names = {panel.name for panel in panels}
    assert ("retrieval" in names) == decoder
    assert ("local" in names) == (family != "vit")


def test_model_that_lacks_sublayers_has_gaps(tmp_path: Path) -> None:
    of = subject(without(tiny_model("llama"), (1, "attention"), (2, "mlp")), tiny_inputs("llama", 1, 10))
    panels = [panel for name in DIAGNOSTICS.names() for panel in DIAGNOSTICS.get(name)().measure(of)]
    by_name = {panel.name: panel for panel in panels}
    assert "blocks.1.attention" not in by_name["sink"].rows
    assert by_name["sensitivity"].values[1][0] is None
    assert by_name["sensitivity"].values[2][1] is None
    assert diagnosis_table(panels).row_count == BLOCKS + 1
    write_diagnosis(panels, tmp_path / "a.svg", "a $x_{ model")
    write_diagnosis(panels[:1], tmp_path / "b.png", "")
    assert (tmp_path / "a.svg").read_text().lstrip().startswith("<?xml")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", DIAGNOSTICS.names())
def test_diagnostic_says_where_it_comes_from(name: str) -> None:
    cls = DIAGNOSTICS.get(name)
    assert "https://arxiv.org/" in cls.source
    assert cls.differs
