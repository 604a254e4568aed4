"""Score files: written, opened, selected from, reported on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as parquet

from prunekit.core.errors import UsageError
from prunekit.datasets import writers
from prunekit.datasets.examples import Settings
from prunekit.datasets.report import ClassRow, class_rows, histogram, html_report
from prunekit.datasets.rules import Rule
from prunekit.datasets.score import Request, write_scores
from prunekit.datasets.select import ScoreFile, open_scores, select, write_selected
from prunekit.datasets.source import Reading, open_source
from prunekit.datasets.writers import format_of
from tests.unit.datasets.conftest import ROWS

KEEP = Rule(keep=0.5, rule="hard", class_floor=0)


def scored(data: Path, folder: Path, *metrics: str, skip_bad: bool = False) -> Path:
    output = folder / "s.parquet"
    asked = {name: {} for name in metrics or ("random",)}
    settings = Settings(cache=folder / "cache")
    write_scores(Request(data, asked, reading=Reading(skip_bad=skip_bad), settings=settings), output)
    return output


def test_score_file_holds_the_data_and_its_manifest(jsonl: Path, tmp_path: Path) -> None:
    file = scored(jsonl, tmp_path, "length", "random")
    table = parquet.read_table(file)
    assert table.column_names == ["text", "label", "score_length", "score_random"]
    assert table.column("text").to_pylist() == [row["text"] for row in ROWS]
    assert table.column("score_length").to_pylist() == [4.0] * 12
    manifest = json.loads((tmp_path / "s.json").read_text())
    assert manifest == json.loads(table.schema.metadata[b"prunekit"])
    assert manifest["data"]["digest"] == open_source(jsonl).digest
    assert manifest["data"]["classes"] == {"0": 6, "1": 6}


def test_scores_are_added_to_scores_but_never_replaced(jsonl: Path, tmp_path: Path) -> None:
    file = scored(jsonl, tmp_path)
    (tmp_path / "more").mkdir()
    more = scored(file, tmp_path / "more", "length")
    assert parquet.read_schema(more).names[-2:] == ["score_random", "score_length"]
    (tmp_path / "again").mkdir()
    with pytest.raises(UsageError, match="already has a column `score_random`"):
        scored(file, tmp_path / "again")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "hf"])
def test_selection_comes_in_the_format_asked_for(form: str, jsonl: Path, tmp_path: Path) -> None:
    if form == "hf":
        pytest.importorskip("datasets")
    file = open_scores(scored(jsonl, tmp_path))
    chosen = select(file, KEEP)
    output = tmp_path / ("out" if form == "hf" else f"out.{form}")
    write_selected(file, chosen, KEEP, output)
    kept = open_source(output)
    expected = sorted(np.argsort(-file.scores)[:6].tolist())
    assert [text for _, block in kept.blocks(5) for text in block] == [ROWS[i]["text"] for i in expected]
    assert kept.opened.format == form
    assert "score_random" not in kept.opened.schema.names
    assert json.loads((tmp_path / f"{output.name}.json").read_text())["indices"] == expected


def test_selected_rows_are_gathered_into_few_row_groups(tmp_path: Path) -> None:
    rows = [{"text": f"film {i}"} for i in range(3000)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    file = open_scores(scored(tmp_path / "d.parquet", tmp_path))
    write_selected(file, select(file, KEEP), KEEP, tmp_path / "out.parquet")
    found = parquet.ParquetFile(tmp_path / "out.parquet").metadata
    assert (found.num_rows, found.num_row_groups) == (1500, 2)


def test_shards_are_selected_from_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_SHARD", 100)
    rows = [{"text": f"film {i}", "label": i % 2} for i in range(3000)]
    (tmp_path / "data").mkdir()
    for number in range(3):
        part = pa.Table.from_pylist(rows[1000 * number : 1000 * number + 1000])
        parquet.write_table(part, tmp_path / f"data/{number}.parquet")
    file = open_scores(scored(tmp_path / "data", tmp_path, "length"))
    write_selected(file, select(file, Rule(keep=1.0)), KEEP, tmp_path / "out")
    kept = open_source(tmp_path / "out")
    assert kept.opened.format == "shards"
    assert [text for _, block in kept.blocks(500) for text in block] == [row["text"] for row in rows]
    assert len(kept.opened.files) == 3


def test_a_folder_is_written_without_a_word(jsonl: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("datasets")
    file = open_scores(scored(jsonl, tmp_path))
    capfd.readouterr()
    write_selected(file, select(file, KEEP), KEEP, tmp_path / "out")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["out", "out.zip"])
def test_selected_images_are_the_same_files(name: str, image_folder: Path, tmp_path: Path) -> None:
    file = open_scores(scored(image_folder, tmp_path))
    chosen = select(file, Rule(keep=0.5, rule="hard"))
    write_selected(file, chosen, KEEP, tmp_path / name)
    kept = open_source(tmp_path / name)
    assert kept.n == 6
    assert kept.classes == ("blue", "red")
    if name == "out":
        assert all(
            f.read_bytes() == (image_folder / f.relative_to(tmp_path / name)).read_bytes() for f in kept.opened.files
        )


def test_selected_paragraphs_make_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n\n".join(f"{'w ' * i}end {i}" for i in range(1, 9)))
    file = open_scores(scored(tmp_path / "t.txt", tmp_path, "length"))
    write_selected(file, select(file, KEEP), KEEP, tmp_path / "out.txt")
    kept = [text for _, block in open_source(tmp_path / "out.txt").blocks(5) for text in block]
    assert [text.split()[-1] for text in kept] == ["5", "6", "7", "8"]


def test_scores_of_another_data_set_are_refused(jsonl: Path, tmp_path: Path) -> None:
    file = scored(jsonl, tmp_path)
    assert open_scores(file, data=jsonl).metric == "random"
    other = tmp_path / "other.jsonl"
    other.write_text(jsonl.read_text().replace("good", "great"))
    with pytest.raises(UsageError, match="another data set than"):
        open_scores(file, data=other)
    (tmp_path / "other.txt").write_text("no labels at all")
    with pytest.raises(UsageError, match="is not known to be of") as raised:
        open_scores(file, data=tmp_path / "other.txt")
    assert "no label column `label`" in raised.value.why


def test_manifest_of_another_score_file_is_refused(jsonl: Path, tmp_path: Path) -> None:
    file = scored(jsonl, tmp_path)
    beside = json.loads((tmp_path / "s.json").read_text())
    beside["data"]["digest"] = "0" * 64
    (tmp_path / "s.json").write_text(json.dumps(beside))
    with pytest.raises(UsageError, match="another data set than"):
        open_scores(file)


def test_file_without_scores_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(UsageError, match="no score file"):
        open_scores(tmp_path / "d.parquet")


def test_one_of_several_metrics_must_be_named(jsonl: Path, tmp_path: Path) -> None:
    file = scored(jsonl, tmp_path, "length", "random")
    with pytest.raises(UsageError, match="several scores"):
        open_scores(file)
    assert open_scores(file, "length").metric == "length"
    with pytest.raises(UsageError, match="no scores of `el2n`"):
        open_scores(file, "el2n")


def test_images_do_not_go_into_text_formats() -> None:
    with pytest.raises(UsageError, match="cannot hold"):
        format_of(Path("x.csv"), {"format": "images", "kind": "image"})


def hostile(folder: Path) -> ScoreFile:
    rows = [{"text": f"<script>alert({i})</script>", "label": "<b>&" if i % 2 else "ok"} for i in range(6)]
    (folder / "<x>.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_scores(scored(folder / "<x>.jsonl", folder))


def test_report_escapes_everything_and_loads_nothing(tmp_path: Path) -> None:
    page, _ = html_report(hostile(tmp_path), KEEP)
    assert "<script" not in page
    assert "<b>" not in page
    assert "class &lt;b&gt;&amp;<" in page
    assert "&lt;script&gt;alert(3)&lt;/script&gt;" in page
    assert "&lt;x&gt;.jsonl" in page
    assert "http:" not in page
    assert "https:" not in page


def test_report_shows_the_hardest_first(jsonl: Path, tmp_path: Path) -> None:
    file = open_scores(scored(jsonl, tmp_path))
    page, chosen = html_report(file, KEEP, n_shown=3)
    order = np.argsort(-file.scores)
    hardest, easiest = page.partition('<h2 id="h-easiest">')[::2]
    cells = [f">{ROWS[i]['text']}<" for i in order]
    assert [cell in hardest for cell in cells] == [True] * 3 + [False] * 9
    assert [cell in easiest for cell in cells] == [False] * 9 + [True] * 3
    assert len(chosen.indices) == 6


def test_report_inlines_images(image_folder: Path, tmp_path: Path) -> None:
    page, _ = html_report(open_scores(scored(image_folder, tmp_path)), KEEP, n_shown=2)
    assert page.count('src="data:image/png;base64,') == 4


def test_report_lists_the_images_that_were_left_out(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "red" / "broken.png").write_bytes(b"nothing")
    file = open_scores(scored(image_folder, tmp_path, skip_bad=True))
    page, _ = html_report(file, KEEP, n_shown=2)
    assert "Left out, since they cannot be read: 1 of 13 images" in page
    assert "red/broken.png: its 7 bytes are no image of a known kind" in page


def test_class_rows_give_counts_and_shares() -> None:
    assert class_rows({"a": 3, "<": 1}, {"a": 1, "<": 1}) == [
        ClassRow("a", "3", "75.0%", 100.0, "1", "50.0%", 66.7),
        ClassRow("<", "1", "25.0%", 33.3, "1", "50.0%", 66.7),
    ]


def test_of_many_classes_those_that_change_most_come_first() -> None:
    before = {f"{number:02}": 10 for number in range(40)}
    rows = class_rows(before, {**dict.fromkeys(before, 5), "17": 0, "23": 10})
    assert {row.name for row in rows[:2]} == {"17", "23"}
    assert len(rows) == 40


def test_histogram_counts_all_and_kept_examples() -> None:
    found = histogram(np.arange(40, dtype=np.float32), np.array([0, 1]))
    assert [bar.top for bar in found.bars] == [0.0] * 40
    assert [bar.kept_top for bar in found.bars] == [0.0, 0.0] + [100.0] * 38
    assert (found.most, found.log) == ("1", False)


def test_histogram_of_a_long_tail_is_logarithmic() -> None:
    scores = np.geomspace(1, 1e6, 400).astype(np.float32)
    found = histogram(scores, np.arange(100))
    assert found.log
    assert {bar.top for bar in found.bars} == {0.0}


def test_histogram_of_equal_scores_has_one_bar() -> None:
    found = histogram(np.zeros(5, np.float32), np.array([2]))
    assert [bar.top for bar in found.bars] == [0.0] + [100.0] * 39
    assert found.bars[0].kept_top == 80.0
