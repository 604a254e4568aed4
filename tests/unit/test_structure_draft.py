"""Drafts of architecture files, against the files there are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunekit.checkpoint.reader import Checkpoint
from prunekit.structure import architecture
from prunekit.structure.draft import MARK, draft
from prunekit.structure.view import ModelView
from tests.tiny import write_tiny

FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "olmo2", "gpt2", "gpt_neox", "opt", "bert", "mixtral", "smolvlm")


@pytest.fixture
def archs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of architecture files in place of prunekit's."""
    (tmp_path / "archs").mkdir()
    monkeypatch.setattr(architecture, "_FOLDER", tmp_path / "archs")
    architecture.architectures.cache_clear()
    yield tmp_path / "archs"
    architecture.architectures.cache_clear()


def real_lines(view: ModelView) -> dict[str, list[str]]:
    """Layout of each tensor of a block that the checkpoint has, as in the real file."""
    found = {}
    for sublayer in view.sublayers:
        for ref in sublayer.tensors:
            name = view.arch.expert_of(view.arch.split(ref.name)[1])[0]  # type: ignore[index]
            found[f"{sublayer.kind} {name}"] = [" ".join(dim) for dim in ref.layout]
    return found


def drafted_lines(text: str) -> tuple[dict[str, list[str]], set[str]]:
    """The same of a draft, and the names in lines that are marked."""
    data: dict[str, Any] = yaml.safe_load(text)
    found = {f"{kind} {name}": layout for kind in ("attention", "ffn") for name, layout in data[kind].items()}
    marked = {line.split(":")[0].strip() for line in text.splitlines() if line.endswith(MARK)}
    return found, marked


@pytest.mark.parametrize("family", FAMILIES)
def test_most_lines_are_those_of_the_real_file_and_the_others_are_marked(family: str, tmp_path: Path) -> None:
    view = ModelView.open(write_tiny(family, tmp_path))
    real, (drafted, marked) = real_lines(view), drafted_lines(draft(view.checkpoint))
    assert {name.split()[1] for name in drafted} == {name.split()[1] for name in real}
    wrong = {name for name, layout in drafted.items() if real.get(name) != layout}
    assert len(wrong) <= len(real) / 5, wrong
    assert {name.split()[1] for name in wrong} <= marked


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_model_opens_by_its_draft(family: str, tmp_path: Path, archs: Path) -> None:
    folder = write_tiny(family, tmp_path / "model")
    assert not architecture.architectures()
    (archs / f"{family}.yaml").write_text(draft(Checkpoint.open(folder)))
    architecture.architectures.cache_clear()
    drafted = ModelView.open(folder)
    real = Path(architecture.__file__).with_name("archs")
    shutil.copy(real / ("llama.yaml" if family == "qwen3" else f"{family}.yaml"), archs / f"{family}.yaml")
    architecture.architectures.cache_clear()
    view = ModelView.open(folder)
    assert drafted.sublayers == view.sublayers
    assert drafted.widths == view.widths
    assert drafted.head == view.head
