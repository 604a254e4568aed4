"""`prunekit report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunekit.cli.report import report
from prunekit.core.errors import UsageError
from tests.runs import manifest, write_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", manifest())


def test_report_lies_in_the_folder_and_is_made_anew(invoke, folder) -> None:
    for _ in range(2):
        done = invoke(report, folder)
        assert done.exit_code == 0, done.exception
        assert done.stdout.splitlines()[-1] == str(folder / "report.html")
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_another_file_is_replaced_only_when_asked(invoke, folder, tmp_path) -> None:
    target = tmp_path / "other.html"
    target.write_text("mine")
    done = invoke(report, folder, "--output", target)
    assert isinstance(done.exception, UsageError)
    assert target.read_text() == "mine"
    assert invoke(report, folder, "--output", target, "--overwrite").exit_code == 0
    assert "</html>" in target.read_text()
    assert not (folder / "report.html").exists()


def test_json_names_the_file(invoke, folder) -> None:
    data = json.loads(invoke(report, folder, "--json").stdout)
    assert data["report"] == str(folder / "report.html")
    assert data["summary"].startswith("12 blocks")


def test_foreign_folder_gets_nothing(invoke, tmp_path) -> None:
    done = invoke(report, tmp_path)
    assert isinstance(done.exception, UsageError)
    assert list(tmp_path.iterdir()) == []
