"""What goes to stdout and what to stderr; progress as lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.table import Table

from prunekit.cli._output import Output, finite
from prunekit.cli._progress import LineProgress, amount_text, bars, rate_text, seconds_text
from prunekit.core.progress import NULL_PROGRESS


def test_talk_goes_to_stderr_and_results_to_stdout(capsys) -> None:
    out = Output()
    out.talk("reading")
    out.result("the result", {"a": 1})
    out.written(Path("out/x"))
    assert capsys.readouterr() == ("the result\nout/x\n", "reading\n")


def test_json_is_the_data_and_nothing_else(capsys) -> None:
    out = Output(json=True)
    out.result("the result", {"a": float("nan"), "b": (1, float("inf")), "c": "ü"})
    out.written(Path("out/x"))
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1, None], "c": "ü"}


def test_quiet_says_nothing_and_shows_no_progress(capsys) -> None:
    out = Output(quiet=True)
    out.talk("reading")
    with out.progress() as progress:
        assert progress is NULL_PROGRESS
    assert capsys.readouterr() == ("", "")


def test_text_in_brackets_is_printed_as_it_is(capsys) -> None:
    table = Table("a [b] head", box=None)
    table.add_row("[red]x[/red] :smile:")
    Output().result(table, {})
    Output().talk("[bold]y")
    out, err = capsys.readouterr()
    assert "a [b] head" in out
    assert "[red]x[/red] :smile:" in out
    assert err == "[bold]y\n"


def test_tables_in_a_pipe_keep_their_columns(capsys, monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    table = Table("a", box=None)
    table.add_row("x" * 95)
    Output().result(table, {})
    assert "x" * 95 in capsys.readouterr().out


def test_lines_in_a_pipe_have_no_blanks_at_their_end(capsys) -> None:
    table = Table("a", "b", box=None)
    table.add_row("x", "short")
    table.add_row("x", "a longer one")
    Output().result(table, {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line == line.rstrip() for line in lines)


def test_finite_keeps_what_json_can_say() -> None:
    assert finite({1: [True, None, 2.5, "x"]}) == {"1": [True, None, 2.5, "x"]}


def test_progress_off_a_terminal_is_lines(capsys) -> None:
    with Output().progress() as progress:
        assert isinstance(progress, LineProgress)


def clock(step: float) -> Iterator[float]:
    now = 0.0
    while True:
        yield now
        now += step


def told(total: int | None, amount: int, step: float, unit: str = "blocks") -> list[str]:
    """Lines of a task that advances `amount` times, `step` seconds apart."""
    lines: list[str] = []
    ticks = clock(step)
    with LineProgress(lines.append, lambda: next(ticks)).task("scoring", total=total, unit=unit) as task:
        for _ in range(amount):
            task.advance(1)
    return lines


def test_lines_come_about_every_tenth_with_rate_and_time_left() -> None:
    lines = told(total=100, amount=100, step=1.0)
    assert len(lines) == 10
    assert lines[0] == "scoring: 10/100 blocks (10 %), 1.0 blocks/s, 1 min 30 s left"
    assert lines[-1] == "scoring: 100 blocks in 1 min 41 s"


def test_quick_work_is_not_talked_about() -> None:
    assert told(total=100, amount=100, step=0.001) == []


def test_work_of_unknown_size_says_when_it_is_done() -> None:
    assert told(total=None, amount=7, step=3.0) == ["scoring: 7 blocks in 3 s"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (amount_text(12, 30, "blocks"), "12/30 blocks"),
        (amount_text(1.5 * 2**30, 4 * 2**30, "bytes"), "1.5/4.0 GiB"),
        (amount_text(7, None, "blocks"), "7 blocks"),
        (rate_text(1.25, "blocks"), "1.2 blocks/s"),
        (rate_text(0.04, "blocks"), "25 s/block"),
        (rate_text(0.04, "processes"), "25 s/process"),
        (rate_text(3 * 2**20, "bytes"), "3.0 MiB/s"),
        (rate_text(1234, "steps"), "1,234 steps/s"),
        (seconds_text(8), "8 s"),
        (seconds_text(200), "3 min 20 s"),
        (seconds_text(7500), "2 h 5 min"),
    ],
)
def test_amounts_read_like_words(text: str, expected: str) -> None:
    assert text == expected


def test_bars_show_amount_rate_and_leave_nothing_behind() -> None:
    import io

    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, color_system=None)
    with bars(console) as progress, progress.task("scoring", total=4, unit="blocks") as task:
        task.advance(1)
        task.advance(1)
    assert "scoring" in screen.getvalue()
    assert "blocks" in screen.getvalue()
