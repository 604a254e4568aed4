"""SpAtten's head score against what a forward pass gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunekit.calibrate.collect import collect
from prunekit.calibrate.stack import Stack
from prunekit.modeling.load import load_model
from prunekit.scores._weights import CheckpointWeights
from prunekit.scores.spatten import Spatten
from prunekit.structure.view import ModelView
from tests.tiny import HEAD, tiny_inputs, write_tiny


@pytest.mark.parametrize(("family", "place"), [("llama", "self_attn.o_proj"), ("gpt2", "attn.c_proj")])
def test_score_is_the_mean_size_of_what_heads_give(family: str, place: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path / "m"))
    model, inputs = load_model(view.checkpoint.folder, "float64"), tiny_inputs(family)
    stats = collect(Stack(model), inputs, Spatten.needs)
    seen: list[torch.Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(place):
            module.register_forward_pre_hook(lambda _, given: seen.append(given[0].abs().flatten(0, 1).mean(0)))
    with torch.no_grad():
        model(**inputs)
    for group, sizes in zip(view.groups("kv_groups"), seen, strict=True):
        found = Spatten().score(group, CheckpointWeights(view.checkpoint), stats)
        expected = sizes.view(len(group.units), -1).mean(1)
        assert sizes.numel() // len(group.units) in (HEAD, 2 * HEAD)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
