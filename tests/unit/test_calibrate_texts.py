"""Text by name and path, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prunekit.calibrate.texts import load_text
from prunekit.core.errors import UsageError


def test_packaged_halves_share_no_line_of_prose() -> None:
    calibration, evaluation = (set(load_text(name).split("\n")) for name in ("wikitext2", "wikitext2_eval"))
    shared = {line for line in calibration & evaluation if len(line.split()) > 8}
    assert not shared
    assert min(len(calibration), len(evaluation)) > 1000


def test_packaged_halves_start_with_an_article() -> None:
    for name in ("wikitext2", "wikitext2_eval"):
        assert load_text(name).lstrip().startswith("= ")


def test_text_file_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffGrüße,\nzweite Zeile\n".encode())
    assert load_text(str(tmp_path / "a.txt")) == "Grüße,\nzweite Zeile\n"


def test_json_lines_are_joined_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\\u2028two", "id": 1}\n\n{"text": "three"}\n')
    assert load_text(str(tmp_path / "a.jsonl")) == "one\u2028two\nthree"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "a line is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "no `text` field"),
        ("a.jsonl", b'{"text": 3}\n', "no `text` field"),
        ("a.jsonl", b'"text"\n', "no `text` field"),
        ("a.txt", b"\xff\xfe\x00", "is not text"),
        ("a.txt", b" \n", "holds no text"),
        ("a.csv", b"text\nx\n", "is not text that can be read"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_text(str(tmp_path / name))


def test_bad_json_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text"\n')
    with pytest.raises(UsageError) as caught:
        load_text(str(path))
    assert caught.value.at == f"{path}:2"


def test_unknown_name_is_refused_with_the_near_one() -> None:
    with pytest.raises(UsageError, match="no text named `wikitext`") as caught:
        load_text("wikitext")
    assert "wikitext2" in caught.value.hint


def test_folder_without_the_datasets_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match="needs the package datasets"):
        load_text(str(tmp_path))


class Column(dict[str, list[str]]):
    @property
    def column_names(self) -> list[str]:
        return list(self)


def pretend(monkeypatch: pytest.MonkeyPatch, saved: Any) -> None:
    """Puts a package `datasets` in place whose load_from_disk returns `saved`."""

    class Splits(dict[str, Column]):
        pass

    package: Any = ModuleType("datasets")
    package.DatasetDict = Splits
    package.load_from_disk = lambda path: Splits(saved) if not isinstance(saved, Column) else saved
    monkeypatch.setitem(sys.modules, "datasets", package)


@pytest.mark.parametrize(
    "saved",
    [
        Column(text=["a", "b"]),
        {"train": Column(text=["a", "b"]), "test": Column(text=["c"])},
        {"x": Column(text=["a", "b"])},
    ],
    ids=["one", "train", "only-split"],
)
def test_saved_data_set_gives_its_text_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Any) -> None:
    pretend(monkeypatch, saved)
    assert load_text(str(tmp_path)) == "a\nb"


@pytest.mark.parametrize(
    ("saved", "message"),
    [(Column(body=["a"]), "no column `text`"), ({"a": Column(text=["x"]), "b": Column(text=["y"])}, "several splits")],
)
def test_data_set_without_a_clear_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: Any, message: str
) -> None:
    pretend(monkeypatch, saved)
    with pytest.raises(UsageError, match=message):
        load_text(str(tmp_path))
