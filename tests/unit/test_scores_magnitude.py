"""Magnitude on numbers worked by hand, and on a real checkpoint's layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prunekit.scores._weights import CheckpointWeights, by_axis
from prunekit.scores.magnitude import Magnitude
from prunekit.structure.view import ModelView
from tests.tiny import HEAD, HIDDEN, write_tiny


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> ModelView:
    return ModelView.open(write_tiny("llama", tmp_path_factory.mktemp("llama")))


def test_positions_of_an_axis_become_rows() -> None:
    tensor = torch.arange(12.0).view(2, 6)
    rows = by_axis(tensor, (("hidden",), ("kv", "hd")), "kv", {"hidden": 2, "kv": 3, "hd": 2})
    assert rows.tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]


def test_sections_of_a_dimension_lie_side_by_side() -> None:
    fused = torch.arange(8.0)[:, None]
    rows = by_axis(fused, (("kv", "rep", "+", "kv", "+", "kv"), ("hidden",)), "kv", {"kv": 2, "rep": 2, "hidden": 1})
    assert rows.tolist() == [[0, 1, 4, 6], [2, 3, 5, 7]]


def test_expert_scores_its_matrices_and_its_row_of_the_router(tmp_path: Path) -> None:
    moe = ModelView.open(write_tiny("mixtral", tmp_path))
    group = moe.groups("experts")[1]
    tensors = load_file(tmp_path / "model.safetensors")
    found = Magnitude(norm="l1").score(group, CheckpointWeights(moe.checkpoint), {})
    own = "model.layers.1.block_sparse_moe"
    for i, value in enumerate(found.tolist()):
        parts = [tensors[f"{own}.experts.{i}.w{number}.weight"].double().flatten() for number in (1, 2, 3)]
        expected = torch.cat([*parts, tensors[f"{own}.gate.weight"][i].double()]).abs().mean()
        assert value == pytest.approx(float(expected), rel=1e-6)


def test_whole_units_score_the_mean_over_their_matrices(view: ModelView) -> None:
    (group,) = view.groups("sublayers")
    tensors = load_file(view.checkpoint.folder / "model.safetensors")
    found = Magnitude(norm="l2").score(group, CheckpointWeights(view.checkpoint), {})
    for refs, value in zip(group.members, found.tolist(), strict=True):
        weights = torch.cat([tensors[ref.name].double().flatten() for ref in refs if len(ref.shape) == 2])
        assert value == pytest.approx(float(weights.square().mean().sqrt()), rel=1e-6)


def test_neuron_scores_its_rows_and_its_column(view: ModelView) -> None:
    group = view.groups("neurons")[1]
    tensors = load_file(view.checkpoint.folder / "model.safetensors")
    gate, up, down = (tensors[f"model.layers.1.mlp.{name}_proj.weight"].double() for name in ("gate", "up", "down"))
    expected = torch.cat([gate, up, down.T], dim=1).abs().mean(dim=1)
    found = Magnitude(norm="l1").score(group, CheckpointWeights(view.checkpoint), {})
    assert torch.allclose(found.double(), expected, rtol=1e-6)


def test_kv_group_owns_its_query_heads(view: ModelView) -> None:
    group = view.groups("kv_groups")[0]
    tensors = load_file(view.checkpoint.folder / "model.safetensors")
    at = "model.layers.0.self_attn"
    q, k, v, o = (tensors[f"{at}.{name}_proj.weight"].double() for name in "qkvo")
    first = torch.cat([q[: 2 * HEAD].flatten(), k[:HEAD].flatten(), v[:HEAD].flatten(), o[:, : 2 * HEAD].flatten()])
    assert first.numel() == 6 * HEAD * HIDDEN
    found = Magnitude().score(group, CheckpointWeights(view.checkpoint), {})
    assert float(found[0]) == pytest.approx(float(first.square().mean().sqrt()), rel=1e-6)
