"""`prunekit verify`: shows the checks and fails when one does."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from prunekit.cli.verify import verify
from prunekit.core.errors import ExpectationError


def report(ok: bool) -> SimpleNamespace:
    problems = () if ok else ("logits differ by 0.5",)
    data = {"ok": ok, "max_abs_diff": 0.0 if ok else 0.5, "problems": list(problems)}
    return SimpleNamespace(ok=ok, problems=problems, to_json=lambda: data)


def test_good_folder_passes(invoke, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("prunekit.export.verify.verify", lambda folder, reference: report(True))
    done = invoke(verify, tmp_path)
    assert done.exit_code == 0, done.exception
    assert any(line.split() == ["ok", "yes"] for line in done.stdout.splitlines())


def test_failed_check_is_shown_and_exits_with_3(invoke, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("prunekit.export.verify.verify", lambda folder, reference: report(False))
    done = invoke(verify, tmp_path, "--json")
    assert isinstance(done.exception, ExpectationError)
    assert done.exception.exit_code == 3
    assert done.exception.why == "logits differ by 0.5"
    assert json.loads(done.stdout)["max_abs_diff"] == 0.5


def test_missing_folder_is_a_usage_error(invoke, tmp_path) -> None:
    assert invoke(verify, tmp_path / "none").exit_code == 2
