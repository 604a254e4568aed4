"""The before/after table: units, digits, changes."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from prunekit.report.table import before_after, lines, markdown

BEFORE = {"params": 134_515_008, "file_bytes": 538_090_408, "perplexity": 26.71, "kv_bytes_per_token": 46_080}
AFTER = {"params": 113_276_160, "file_bytes": 453_135_000, "perplexity": 53.02, "kv_bytes_per_token": 38_400}


def by_label(before: dict[str, float | None], after: dict[str, float | None]) -> dict[str, tuple[str, ...]]:
    return {x.label: (x.unit, x.before, x.after, x.change) for x in lines(before, after)}


def test_lines_scale_both_sides_alike_and_give_the_change() -> None:
    shown = by_label(BEFORE, AFTER)
    assert shown["parameters"] == ("M", "134.5", "113.3", "-15.8")
    assert shown["weight files"] == ("MiB", "513.2", "432.1", "-15.8")
    assert shown["KV cache a token"] == ("KiB", "45.0", "37.5", "-16.7")
    assert shown["perplexity"] == ("", "26.7", "53.0", "+98.5")


def test_small_after_keeps_the_unit_of_before() -> None:
    assert by_label({"params": 20_000_000}, {"params": 400_000})["parameters"] == ("M", "20.0", "0.4000", "-98.0")


def test_measurement_of_one_side_shows_a_dash() -> None:
    assert by_label({"perplexity": None}, {"perplexity": 30.0})["perplexity"][1:] == ("-", "30.0", "-")


def test_unmeasured_and_zero_on_both_sides_are_left_out() -> None:
    shown = by_label({"kv_bytes_per_token": 0, "perplexity": None}, {"kv_bytes_per_token": 0})
    assert shown == {}


def test_falling_to_zero_is_a_hundred_per_cent() -> None:
    assert by_label({"kv_bytes_per_token": 46_080}, {"kv_bytes_per_token": 0})["KV cache a token"][3] == "-100.0"


def test_numbers_align_right_in_the_terminal() -> None:
    console = Console(file=StringIO(), width=100, color_system=None)
    console.print(before_after(lines(BEFORE, AFTER)))
    rows = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    ends = {row.rstrip().rfind(".") for row in rows[1:]}
    assert len(ends) == 1, rows


def test_markdown_has_one_row_a_line() -> None:
    text = markdown(lines(BEFORE, AFTER)).splitlines()
    assert text[0] == "| | unit | before | after | change (%) |"
    assert text[2] == "| parameters | M | 134.5 | 113.3 | -15.8 |"
    assert len(text) == 2 + 4
