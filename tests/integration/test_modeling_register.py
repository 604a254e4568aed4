"""Heterogeneous folders and the Auto classes in fresh processes, with and without prunekit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.heterogeneous import heterogeneous, without
from tests.tiny import FAMILIES, tiny_inputs, tiny_model

LOAD = """
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model).__module__ == "prunekit.modeling.modeling_prunekit", type(model)
assert type(AutoModel.from_pretrained(folder)).__name__ == "PrunekitQwen2Model"
assert AutoConfig.from_pretrained(folder).prunekit["per_layer_config"] == {"00": {"skip": ["attention"]}}
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
assert "prunekit" in ALL_ATTENTION_FUNCTIONS.valid_keys()
"""
PRUNEKIT_FIRST = f"""
import sys
import prunekit
assert not {{"torch", "transformers"}} & set(sys.modules)
from transformers import Qwen2ForCausalLM
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
{LOAD}
"""
TRANSFORMERS_FIRST = f"""
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
import prunekit
{LOAD}
"""
DASH = """
import prunekit
from transformers import AutoModel
model = AutoModel.from_pretrained(folder)
assert (type(model).__name__, model.config.model_type) == ("PrunekitXLMRobertaModel", "prunekit_xlm-roberta")
"""
WITHOUT = """
import os
from transformers import AutoModel, AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
except ValueError:
    pass
else:
    raise AssertionError("it loaded without being trusted")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert type(AutoModel.from_pretrained(again, trust_remote_code=True)).__name__ == "PrunekitQwen2Model"
import sys
assert not any(name.split(".")[0] == "prunekit" for name in sys.modules)
assert not [name for name in sys.modules if "modeling_llama" in name or "modeling_bert" in name]
"""


EVERY_FAMILY = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
for case in sorted(Path(folder).glob("*.safetensors")):
    own = case.with_suffix("")
    auto = list(json.loads((own / "config.json").read_text())["auto_map"])[-1]
    # The grouped product of experts knows no float64.
    options = {"dtype": torch.float64, "experts_implementation": "eager"}
    model = getattr(transformers, auto).from_pretrained(own, trust_remote_code=True, **options)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    inputs = load_file(case)
    expected = inputs.pop("expected")
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs)[0], expected), case.name
assert not any(name.split(".")[0] == "prunekit" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heterogeneous")
    without(tiny_model("qwen2"), (0, "attention")).save_pretrained(path)
    return path


def run(code: str, folder: Path, scratch: Path, path: list[str]) -> None:
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONPATH": os.pathsep.join(path)}
    code = f"folder, again = {str(folder)!r}, {str(scratch / 'again')!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=scratch, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [PRUNEKIT_FIRST, TRANSFORMERS_FIRST], ids=["prunekit-first", "transformers-first"])
def test_auto_classes_load_it_beside_prunekit(code: str, folder: Path, tmp_path: Path) -> None:
    import prunekit

    run(code, folder, tmp_path, [str(Path(prunekit.__path__[0]).parent)])


def test_auto_classes_load_a_model_type_with_a_dash(tmp_path: Path) -> None:
    import prunekit

    without(tiny_model("xlm-roberta"), (0, "attention")).save_pretrained(tmp_path / "folder")
    run(DASH, tmp_path / "folder", tmp_path, [str(Path(prunekit.__path__[0]).parent)])


def test_own_modeling_file_loads_it_and_is_saved_along(folder: Path, tmp_path: Path) -> None:
    run(WITHOUT, folder, tmp_path, [])


def test_own_modeling_file_loads_every_family(tmp_path: Path) -> None:
    layers = {"01": {"skip": ["attention"]}, "02": {"skip": ["mlp"]}, "03": {"intermediate_size": 20}}
    (tmp_path / "folders").mkdir()
    for family in FAMILIES:
        model, inputs = heterogeneous(tiny_model(family), layers), tiny_inputs(family)
        model.save_pretrained(tmp_path / "folders" / family)
        with torch.no_grad():
            save_file({**inputs, "expected": model(**inputs)[0]}, tmp_path / "folders" / f"{family}.safetensors")
    run(EVERY_FAMILY, tmp_path / "folders", tmp_path, [])
