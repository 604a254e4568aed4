"""`prunekit data`: from a data set to what stays, and the errors on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from prunekit.cli.data import knobs_of
from prunekit.cli.main import main
from prunekit.core.errors import UsageError


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten texts in the working folder."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"film {'very ' * i}good", "label": i % 2} for i in range(10)]
    (tmp_path / "films.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "films.jsonl"


def run(*words: object) -> int:
    return main(["data", *map(str, words)])


def test_score_select_report_by_their_defaults(films: Path, capsys) -> None:
    assert run("score", films, "--metric", "length", "-q") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "films.scores.parquet"
    assert run("select", "films.scores.parquet", "--keep", 0.3, "--rule", "hard", "-q") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "films-selected.jsonl"
    kept = [json.loads(line)["text"].count("very") for line in Path("films-selected.jsonl").read_text().splitlines()]
    assert kept == [7, 8, 9]
    assert run("report", "films.scores.parquet", "-q") == 0
    assert "film very good" in Path("films.scores.html").read_text()


def test_dry_run_says_what_would_stay_and_writes_nothing(films: Path, capsys) -> None:
    run("score", films, "--metric", "length", "-q")
    capsys.readouterr()
    before = sorted(Path().iterdir())
    assert run("select", "films.scores.parquet", "--examples", 4, "--dry-run", "--json", "-q") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["kept"], found["rule"], found["output"]) == (4, "easy", None)
    assert sorted(Path().iterdir()) == before


def test_token_budget_without_a_length_score_is_refused(films: Path, capsys) -> None:
    run("score", films, "--metric", "random", "-q")
    assert run("select", "films.scores.parquet", "--tokens", 10, "-q") == 2
    assert "--metric length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score", "none.jsonl", "--metric", "random"], "no data set"),
        (["score", "films.jsonl", "--metric", "eln2"], "did you mean `el2n`?"),
        (["score", "films.jsonl", "--metric", "random", "--set", "sed=1"], "unknown key"),
        (["score", "films.jsonl", "--metric", "random", "--label-column", "class"], "no label column `class`"),
        (["score", "films.jsonl", "--metric", "random", "-o", "x.csv"], "must end in .parquet"),
        (["select", "none.parquet", "--keep", "0.3"], "no score file"),
        (["select", "films.scores.parquet", "--keep", "1.3"], "0 < keep <= 1"),
        (["select", "films.scores.parquet"], "no budget"),
        (["select", "films.scores.parquet", "--keep", "0.3", "--rule", "hrd"], "did you mean `hard`?"),
        (["select", "films.scores.parquet", "--keep", "0.3", "--near-duplicates", "1.5"], "between 0 and 1"),
        (["select", "films.scores.parquet", "--keep", "0.3", "-o", "x.png"], "names no format"),
    ],
)
def test_wrong_use_ends_with_2_and_one_message(words: list[str], message: str, films: Path, capsys) -> None:
    run("score", films, "--metric", "length", "-q")
    capsys.readouterr()
    if words[0] == "score" and "-o" not in words:
        words = [*words, "-o", "other.parquet"]
    assert run(*words, "-q") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("error:") == 1


def test_what_exists_is_not_replaced_unasked(films: Path, capsys) -> None:
    assert run("score", films, "--metric", "random", "-q") == 0
    assert run("score", films, "--metric", "random", "-q") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run("score", films, "--metric", "random", "-q", "--overwrite") == 0


def test_images_that_are_left_out_are_counted_and_named(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("PIL")
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Path("pictures/red").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save("pictures/red/good.png")
    Path("pictures/red/bad.png").write_bytes(b"nothing")
    assert run("score", "pictures", "--metric", "random") == 2
    assert "--skip-bad" in capsys.readouterr().err
    assert run("score", "pictures", "--metric", "random", "--skip-bad") == 0
    error = capsys.readouterr().err
    assert "left out, since they cannot be read: 1 of 2 images" in error
    assert "red/bad.png: its 7 bytes are no image of a known kind" in error


def test_knobs_go_to_all_metrics_or_to_the_one_named() -> None:
    found = knobs_of(["el2n", "loss"], ["epochs=2", "el2n.models=3"])
    assert found == {"el2n": {"epochs": 2, "models": 3}, "loss": {"epochs": 2}}
    with pytest.raises(UsageError, match="not asked for"):
        knobs_of(["el2n"], ["loss.models=3"])
