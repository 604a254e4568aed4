"""`prunekit bench attention`: checks, times, and no ratio where a check failed."""

from __future__ import annotations

import json

import pytest
import torch

from prunekit.cli.main import main
from prunekit.core.registry import PATTERNS
from prunekit.runtime.attention import bench, decode

SMALL = ["bench", "attention", "--device", "cpu", "--length", "64", "--quiet", "--json"]


@pytest.fixture(autouse=True)
def one_length(monkeypatch) -> None:
    monkeypatch.setattr(bench, "CHECKED_LENGTHS", (40,))


def test_ratios_stand_beside_what_was_timed_once_all_checks_passed(capsys) -> None:
    assert main(SMALL) == 0
    found = json.loads(capsys.readouterr().out)
    assert all(check["passed"] for check in found["checks"])
    assert {check["what"].split()[0] for check in found["checks"]} >= {"step", "gradient"}
    classes = {PATTERNS.get(name).__name__ for name in PATTERNS.names()}
    assert {check["what"].removeprefix("step of ").split("(")[0] for check in found["checks"]} >= classes
    sparse = [row for row in found["rows"] if row["what"] not in bench.DENSE]
    assert {row["shape"].split()[0] for row in sparse} == {"prompt", "image", "gradients", "step"}
    assert all(row["times_baseline"] > 0 and row["baseline"] in bench.DENSE for row in sparse)
    assert all(row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] for row in found["rows"])


def test_a_failed_check_takes_the_ratios_away_and_is_an_error(monkeypatch, capsys) -> None:
    monkeypatch.setitem(bench.cases.RELATIVE, torch.float32, 0.0)
    assert main(SMALL) == 3
    said = capsys.readouterr()
    assert '"times_baseline": null' in said.out
    assert '"baseline": "dense' not in said.out
    assert "checks failed, so no ratio is given" in said.out + said.err


def test_a_step_that_reads_the_wrong_pages_fails_its_check(monkeypatch, capsys) -> None:
    right = decode.select_blocks
    monkeypatch.setattr(decode, "select_blocks", lambda scores, *rest, **options: right(-scores, *rest, **options))
    assert main(SMALL) == 3
    assert "step of Quest(page_tokens=4, budget_tokens=16)" in capsys.readouterr().out


def test_strict_wants_kernels(capsys) -> None:
    assert main([*SMALL, "--strict"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["what"] == "no kernel runs here"
    assert "the tensors are on `cpu`" in error["why"]


def test_lengths_of_nothing_are_refused(capsys) -> None:
    assert main(["bench", "attention", "--length", "0"]) == 2
    assert "are counts" in capsys.readouterr().err
