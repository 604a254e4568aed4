"""Healing under FSDP2, in two processes over gloo: each holds half of the model, the first one gets all of it back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prunekit.heal.run import heal
from tests.healing import bench
from tests.ranks import together

# accelerate shards on accelerators alone; told that these processes are on some, it shards on the CPU.
SHARDED = """
import json, sys
from pathlib import Path
import torch
from accelerate.state import DistributedType, PartialState
begin = PartialState.__init__
def on_accelerators(self, *given, **named):
    begin(self, *given, **named)
    if PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
PartialState.__init__ = on_accelerators
from prunekit.core.ranks import joined
from prunekit.heal import _loop
from prunekit.heal.run import heal
from prunekit.plan.layout import choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from tests.healing import DROP, Bench
folder, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
train = _loop.train
def trained(model, *given):
    found = train(model, *given)
    parameter = next(model.parameters())
    print(type(parameter.data).__name__, parameter.to_local().numel(), parameter.numel())
    return found
_loop.train = trained
with joined() as ranks:
    there = folder / "alone"
    view = ModelView.open(there / "dense")
    pairs = choose_layout(view, Plan.make(view, DROP)).pairs
    setting = Bench(there / "dense", there / "cut", there / "text.txt", pairs, there / "cache")
    healed = heal(setting.scene(**asked), folder / "work")
    if ranks.first:
        (folder / "healed").mkdir()
        healed.write(folder / "healed", 10**9)
    ranks.wait()
"""
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
         "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}  # fmt: skip


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("asked", ["{}", '{"train": "lora"}', '{"top_k": 8, "held_out": 0.0}'])
def test_parts_of_a_model_train_to_the_weights_of_the_whole(tmp_path: Path, asked: str) -> None:
    setting = bench(tmp_path / "alone")
    (tmp_path / "whole").mkdir()
    torch.manual_seed(0)
    heal(setting.scene(**json.loads(asked)), tmp_path / "alone-work").write(tmp_path / "whole", 10**9)
    ended = together(["-c", SHARDED, str(tmp_path), asked], env={**FSDP2, "PYTHONPATH": ":".join(sys.path)})
    assert [rank.code for rank in ended] == [0, 0], ended[0].err[-3000:] + ended[1].err[-3000:]
    for rank in ended:
        name, local, count = rank.out.split()
        assert name == "DTensor"
        assert 2 * int(local) == int(count)
    raw, one, two = weights(setting.cut), weights(tmp_path / "whole"), weights(tmp_path / "healed")
    assert one.keys() == two.keys() == raw.keys()
    moved = max(float((one[key] - raw[key]).abs().max()) for key in one)
    apart = max(float((one[key] - two[key]).abs().max()) for key in one)
    # Sums in another order; Adam makes a step of noise where a gradient is near zero.
    assert apart <= 0.02 * moved, (apart, moved)
