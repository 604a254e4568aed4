"""The HTML report as text: escaping, no requests, parts that are missing, folders that are refused."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from prunekit.core.errors import UsageError
from prunekit.report.charts import heat_map, line_chart, nice_range
from prunekit.report.html import html_report
from prunekit.report.run import OrderPart, PlanPart, Run, ScoresPart, read_run
from tests.runs import manifest, old_manifest, write_run

HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{7*7}}"


def page(data: dict[str, Any]) -> str:
    return html_report(Run.model_validate(data))


def test_text_of_a_run_is_escaped_everywhere() -> None:
    plain, text = page(manifest()), page(manifest(HOSTILE))
    assert text.count("<script") == plain.count("<script") == 1
    assert "<img" not in text
    assert "{{7*7}}" in text
    assert text.count("&lt;img src=x onerror=alert(1)&gt;") > 10


def test_page_asks_for_nothing_outside_itself() -> None:
    text = page(manifest())
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|@import|url\(|\bsrc=|<link(?![^>]*href=\"data:,\")", text)


def test_sections_of_a_whole_run() -> None:
    text = page(manifest())
    assert "Not recorded" not in text
    for words in ("113.3", "−15.8", "gardener", "kv groups", "blocks.7.ffn", "✗ missed", "there was a dog", "ab" * 32):
        assert words in text


def test_folder_of_an_older_version_says_what_is_missing() -> None:
    text = page(old_manifest())
    missing = re.findall(r'class="missing">Not recorded: ([^<]*)<', text)
    assert len(missing) == 8, missing
    assert any("no scores" in line for line in missing)
    assert any("no removal order" in line for line in missing)


def test_dense_model_is_the_first_point_and_overflow_leaves_a_gap() -> None:
    order = OrderPart.model_validate(
        {"method": "m", "steps": [{"units": ["a"], "distance": d} for d in (0.2, float("inf"), 0.4, 0.3)]}
    )
    chart = line_chart(order)
    assert [(p.x, p.y) for p in chart.points] == [(0, 0), (25, 50), (None, None), (75, 100), (100, 75)]
    assert chart.path == "M0 100L25 50M75 0L100 25"
    assert [tick.text for tick in chart.y_ticks] == ["0", "0.1", "0.2", "0.3", "0.4"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 0.37, (0, 0.4)),
        (0, 1, (0, 1)),
        (0, 0, (0, 1)),
        (-0.3, 0.9, (-0.5, 1.0)),
        (0, 3e-7, (0, 3e-7)),
        (2, 9, (0, 10)),
    ],
)
def test_axis_holds_zero_and_all_values_in_round_numbers(
    low: float, high: float, expected: tuple[float, float]
) -> None:
    bottom, top, ticks = nice_range(low, high)
    assert (bottom, top) == pytest.approx(expected)
    assert ticks[0] == bottom
    assert ticks[-1] == top
    assert 3 <= len(ticks) <= 6


def scores(kind: str, values: dict[str, float | None]) -> ScoresPart:
    return ScoresPart.model_validate(
        {"method": "m", "kind": kind, "units": list(values), "values": list(values.values())}
    )


PLAN = PlanPart.model_validate(
    {
        "drop": ["blocks.0.attention", "blocks.0.ffn", "blocks.1.ffn"],
        "keep": {"blocks.2.attention.kv_groups": [0, 2], "blocks.3.attention.kv_groups": [0]},
        "model": {"sublayers": [[f"blocks.{b}.attention", 3, 3, 64] for b in range(4)]},
    }
)


def test_heat_of_blocks_marks_those_that_went_whole() -> None:
    heat = heat_map(scores("blocks", {"blocks.0": 1.0, "blocks.1": 2.0, "blocks.2": 10.0, "blocks.3": None}), PLAN)
    ((_, cells),) = heat.rows
    assert [cell.shade for cell in cells] == [0, 1, 8, None]
    assert [cell.removed for cell in cells] == [True, False, False, False]
    assert heat.gone == (("blocks.0", "1"),)


def test_heat_of_heads_marks_cut_heads_and_removed_sublayers() -> None:
    values = {f"blocks.{b}.attention.kv_groups.{g}": float(g) for b in (0, 1, 2) for g in range(3)}
    rows = dict(heat_map(scores("kv_groups", values), PLAN).rows)
    removed = {name: [cell.removed for cell in cells] for name, cells in rows.items()}
    assert removed["blocks.0.attention"] == [True, True, True]
    assert removed["blocks.1.attention"] == [False, False, False]
    assert removed["blocks.2.attention"] == [False, True, False]


def test_heat_marks_nothing_where_positions_are_those_of_an_earlier_cut() -> None:
    values = {f"blocks.2.attention.kv_groups.{g}": float(g) for g in range(2)}
    ((_, cells),) = heat_map(scores("kv_groups", values), PLAN).rows
    assert [cell.removed for cell in cells] == [False, False]


def test_widths_of_a_block_are_before_and_after() -> None:
    text = page(manifest())
    row = re.search(r'<th scope="row">1</th>(.*?)</tr>', text).group(1)
    assert re.findall(r">([^<]+)</td>", row) == ["9 → 6", "3 → 2", "1,536"]


def test_heat_of_many_units_shows_their_spread() -> None:
    values = {f"blocks.0.ffn.neurons.{i}": float((i * 7) % 101) for i in range(101)}
    heat = heat_map(scores("neurons", values), PLAN)
    assert heat.quantiles
    assert [cell.text for cell in heat.rows[0][1]] == [str(10 * i) for i in range(11)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no `prunekit.json`"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a manifest"),
        ("{}", "is not a manifest"),
        (json.dumps({**manifest(), "schema": 2}), "is not a manifest"),
        (json.dumps({**manifest(), "before": {"params": "many"}}), "is not a manifest"),
        (json.dumps({**manifest(), "layer_map": [{"block": 0}]}), "is not a manifest"),
    ],
)
def test_broken_or_foreign_folder_is_one_clear_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "prunekit.json").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_run(tmp_path)
    assert "prunekit prune" in caught.value.hint


def test_no_folder_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        read_run(tmp_path / "none")


def test_manifest_with_any_value_changed_is_shown_or_refused(tmp_path: Path) -> None:
    draw = random.Random(0)
    whole = manifest()
    places = list(_places(whole))
    shown = refused = 0
    for place in draw.sample(places, 150):
        data = copy.deepcopy(whole)
        inside: Any = data
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = draw.choice([None, "x", -1, 1e400, [], {}, [None], True])
        write_run(tmp_path, data)
        try:
            assert "</html>" in html_report(read_run(tmp_path))
            shown += 1
        except UsageError:
            refused += 1
    assert shown > 20
    assert refused > 20


def _places(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*place, key)
        yield from _places(value, (*place, key))
