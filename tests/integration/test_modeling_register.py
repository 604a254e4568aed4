"""Heterogeneous folders and the Auto classes in fresh processes, with and without prunekit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.heterogeneous import without
from tests.tiny import tiny_model

LOAD = """
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model).__module__ == "prunekit.modeling.modeling_prunekit", type(model)
assert type(AutoModel.from_pretrained(folder)).__name__ == "PrunekitQwen2Model"
assert AutoConfig.from_pretrained(folder).prunekit["per_layer_config"] == {"00": {"skip": ["attention"]}}
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


def test_own_modeling_file_loads_it_and_is_saved_along(folder: Path, tmp_path: Path) -> None:
    run(WITHOUT, folder, tmp_path, [])
