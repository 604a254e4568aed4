"""What a recipe may name as its model, and what is said to everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prunekit.checkpoint.sources import resolve
from prunekit.core.errors import CheckpointError, UsageError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a model."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def refusal(source: str | Path, cache: Path, **options: str) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        resolve(str(source), cache=cache, **options)
    assert not cache.exists()
    return caught.value


def test_folder_is_taken_as_it_is(model: Path) -> None:
    found = resolve(str(model))
    assert (found.folder, found.name, found.kind, found.revision) == (model, "my-model", "folder", None)


def test_folder_with_a_trailing_dot_has_its_own_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model)
    assert resolve(".").name == "my-model"


def test_folder_beats_a_packaged_name(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model.rename(model.parent / "all-minilm-l6-v2")
    monkeypatch.chdir(model.parent)
    assert resolve("all-minilm-l6-v2").kind == "folder"


@pytest.mark.parametrize("source", ["folder", "smollm2-135m-instruct"])
def test_revision_of_anything_but_a_hub_id_is_refused(model: Path, source: str) -> None:
    with pytest.raises(UsageError, match="has no revisions"):
        resolve(str(model) if source == "folder" else source, revision="main")


@pytest.mark.parametrize(
    ("source", "near"),
    [("smollm2-135m-instuct", "smollm2-135m-instruct"), ("ALL-MiniLM-L6", "all-minilm-l6-v2")],
)
def test_misspelt_packaged_name_gets_a_hint(tmp_path: Path, source: str, near: str) -> None:
    assert refusal(source, tmp_path / "cache").hint == f"did you mean `{near}`?"


def test_misspelt_folder_gets_a_hint(model: Path, tmp_path: Path) -> None:
    assert refusal(model.parent / "my-modl", tmp_path / "cache").hint == f"did you mean `{model}`?"


def test_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    hint = refusal("qqqq", tmp_path / "cache").hint
    assert "`smollm2-135m-instruct`" in hint
    assert "owner/name" in hint


def test_hub_id_offline_says_so_with_the_command(tmp_path: Path) -> None:
    error = refusal("someone/some-model", tmp_path / "cache", revision="v1.0")
    assert "cannot get `someone/some-model` at revision `v1.0`" in str(error)
    assert "the hub cannot be reached" in error.why
    assert "hf download someone/some-model --revision v1.0" in error.hint


@pytest.mark.parametrize(
    "names",
    [
        ["pytorch_model.bin"],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
        ["consolidated.00.pth"],
        ["model.ckpt"],
    ],
    ids=lambda names: names[0],
)
def test_folder_with_pickles_alone_is_refused_unopened(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ["config.json", *names]:
        (folder / name).write_bytes(b"{}")
    error = refusal(folder, tmp_path / "cache")
    assert f"`{sorted(names)[0]}` is a pickle" in str(error)
    assert "safetensors/convert" in error.hint


def test_pickle_beside_safetensors_does_not_matter(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(b"")
    assert resolve(str(model)).folder == model


def test_pickle_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"")
    assert "is a pickle" in str(refusal(tmp_path / "w.pt", tmp_path / "cache"))


def test_weights_file_points_at_its_folder(model: Path, tmp_path: Path) -> None:
    error = refusal(model / "model.safetensors", tmp_path / "cache")
    assert error.hint == f"give its folder: {model}"


def test_folder_of_gguf_files_asks_for_one_of_them(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "a.Q4.gguf").write_bytes(b"GGUF")
    assert refusal(tmp_path / "files", tmp_path / "cache").hint.endswith("a.Q4.gguf")


def test_empty_folder_holds_no_weights(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no weights" in str(refusal(tmp_path / "empty", tmp_path / "cache"))


def test_file_that_only_ends_like_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"something else")
    assert "is not a GGUF file" in str(refusal(tmp_path / "a.gguf", tmp_path / "cache"))
