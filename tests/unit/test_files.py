"""Folders and files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from prunekit.core.errors import UsageError
from prunekit.core.files import atomic_folder, sha256_file, write_json


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "o") as fresh:
        (fresh / "x").write_text("1")
        assert not (tmp_path / "a" / "o").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["o"]


def fails_inside(target: Path, error: type[BaseException]) -> None:
    with atomic_folder(target, overwrite=True) as fresh:
        (fresh / "config.json").write_text("new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_failure_leaves_nothing_and_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "config.json").write_text("old")
    with pytest.raises(error):
        fails_inside(tmp_path / "o", error)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    assert (tmp_path / "o" / "config.json").read_text() == "old"


def test_overwrite_replaces_the_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "config.json").write_text("old")
    (tmp_path / "o" / "gone").write_text("old")
    with atomic_folder(tmp_path / "o", overwrite=True) as fresh:
        (fresh / "config.json").write_text("new")
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["config.json"]


def test_folder_with_files_is_refused_and_one_that_is_no_model_always(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError), atomic_folder(tmp_path, overwrite=overwrite):
            pass
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "o").write_text("mine")
    with pytest.raises(UsageError, match="not a folder"), atomic_folder(tmp_path / "o", overwrite=True):
        pass
    with pytest.raises(UsageError, match="cannot be made"), atomic_folder(tmp_path / "o" / "p"):
        pass


def test_leftovers_of_killed_runs_are_cleared(tmp_path: Path) -> None:
    gone, living = 4_000_000, os.getppid()
    for pid in (gone, living):
        (tmp_path / f".o.{pid}.part").mkdir()
    (tmp_path / f".o.{gone}.old").mkdir()
    (tmp_path / f".o.{gone}.old" / "config.json").write_text("old")
    with pytest.raises(ValueError):  # noqa: PT011 (which one does not matter)
        fails_inside(tmp_path / "o", ValueError)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f".o.{living}.part", "o"]
    assert (tmp_path / "o" / "config.json").read_text() == "old"


def test_json_is_written_in_one_step(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": [1], "ü": None})
    assert (tmp_path / "a.json").read_text() == '{\n  "b": [\n    1\n  ],\n  "ü": null\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {1j})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert len(sha256_file(tmp_path / "a.json")) == 64
