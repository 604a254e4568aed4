"""Data sets in every format read alike, and say what is wrong with them."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as parquet

from prunekit.core.errors import UsageError
from prunekit.datasets.source import Reading, Source, class_counts, open_source
from tests.unit.datasets.conftest import ROWS, png


def texts(source: Source, size: int = 5) -> list[str]:
    return [text for _, block in source.blocks(size) for text in block]


def written(form: str, folder: Path) -> Path:
    table = pa.Table.from_pylist(ROWS)
    file = folder / f"d.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif form == "csv":
        csv.write_csv(table, file)
    elif form == "parquet":
        parquet.write_table(table, file)
    elif form == "shards":
        file = folder / "shards"
        file.mkdir()
        parquet.write_table(table.slice(0, 7), file / "a-0.parquet")
        parquet.write_table(table.slice(7), file / "a-1.parquet")
    else:
        file = folder / "saved"
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(ROWS).save_to_disk(str(file))
    return file


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "shards", "hf"])
def test_every_format_gives_the_same_examples(form: str, tmp_path: Path) -> None:
    source = open_source(written(form, tmp_path))
    assert texts(source) == [row["text"] for row in ROWS]
    assert source.codes is not None
    assert source.codes.tolist() == [row["label"] for row in ROWS]
    assert source.classes == ("0", "1")


def test_class_names_of_a_saved_data_set_are_used(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    datasets.Dataset.from_list(ROWS, features=features).save_to_disk(str(tmp_path / "d"))
    assert open_source(tmp_path / "d").classes == ("neg", "pos")


def test_blocks_have_the_size_asked_for_and_only_wanted_ones_come(jsonl: Path) -> None:
    source = open_source(jsonl)
    assert [(first, len(block)) for first, block in source.blocks(5)] == [(0, 5), (5, 5), (10, 2)]
    assert [first for first, _ in source.blocks(5, lambda number: number % 2 == 1)] == [5]


def test_class_numbers_follow_the_sorted_labels_not_the_rows(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"text": "a", "label": name}) + "\n" for name in ("dog", "cat", "dog")))
    source = open_source(file)
    assert source.codes is not None
    assert (source.classes, source.codes.tolist()) == (("cat", "dog"), [1, 0, 1])
    assert class_counts(source.codes, source.classes) == {"cat": 1, "dog": 2}


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ("paragraphs", ["one two\nthree", "four five"]),
        ("lines", ["one two", "three", "four five"]),
        ("windows", ["one two", "three four", "five"]),
    ],
)
def test_text_file_is_cut_into_pieces(pieces: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one two\nthree\n\n\nfour five\n")
    reading = Reading(pieces=pieces, window_words=2)  # type: ignore[arg-type]
    assert texts(open_source(tmp_path / "t.txt", reading)) == expected


def test_zip_and_folder_of_images_give_the_same_examples(image_folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        for file in image_folder.rglob("*.png"):
            archive.write(file, file.relative_to(image_folder))
    folder, packed = open_source(image_folder), open_source(tmp_path / "p.zip")
    assert folder.kind == packed.kind == "image"
    assert folder.classes == packed.classes == ("blue", "red")
    a, b = (np.stack([np.asarray(i) for _, v in s.blocks(5) for i in s.decoded(v)]) for s in (folder, packed))
    assert np.array_equal(a, b)


def test_unreadable_images_are_counted_and_listed(image_folder: Path) -> None:
    (image_folder / "red" / "broken.png").write_bytes(b"no image")
    (image_folder / "blue" / "short.png").write_bytes(png((1, 2, 3))[:40])
    with pytest.raises(UsageError, match="2 of 14 images") as raised:
        open_source(image_folder)
    assert "red/broken.png: its 8 bytes are no image" in raised.value.why
    assert "blue/short.png" in raised.value.why


def test_unreadable_images_are_left_out_when_asked(image_folder: Path) -> None:
    (image_folder / "blue" / "0.png").write_bytes(b"no image")
    source = open_source(image_folder, Reading(skip_bad=True))
    assert source.n == 12
    assert [bad.name for bad in source.bad] == ["blue/0.png"]
    assert source.codes is not None
    assert len(source.codes) == sum(len(block) for _, block in source.blocks(5)) == 12


def test_image_path_out_of_the_folder_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png((0, 0, 0)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "d.jsonl").write_text('{"image": "../secret.png"}\n')
    with pytest.raises(UsageError) as raised:
        open_source(tmp_path / "d" / "d.jsonl")
    assert "leads out" in raised.value.why


def test_digest_follows_the_content(jsonl: Path) -> None:
    before = open_source(jsonl).digest
    assert open_source(jsonl).digest == before
    jsonl.write_text(jsonl.read_text().replace("number 3", "number three"))
    assert open_source(jsonl).digest != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"text": "a"}\nnot json\n', "cannot be read"),
        ("d.jsonl", '{"words": "a"}\n', "no text and no image column"),
        ("d.jsonl", '{"text": "a"}\n{"text": null}\n', "1 of 2 examples"),
        ("d.jsonl", '{"text": 3}\n', "holds no text"),
        ("d.jsonl", '{"text": "a", "label": [0, 1]}\n', "holds no classes"),
        ("d.jsonl", "", "cannot be read"),
        ("d.parquet", "no parquet", "cannot be read"),
        ("d.zip", "no zip", "cannot be read"),
        ("d.txt", "\n\n", "holds no examples"),
        ("d.doc", "x", "no data set that can be read"),
    ],
)
def test_bad_file_is_one_clear_error(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        texts(open_source(tmp_path / name))


def test_rows_of_a_parquet_file_of_one_row_group_are_read_page_by_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.bytes(4096).hex() for _ in range(4000)]
    parquet.write_table(pa.table({"text": texts}), tmp_path / "d.parquet", row_group_size=4000, use_dictionary=False)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in open_source(tmp_path / "d.parquet").batches())
    assert most < 16 << 20, "of 32 MB of text"


def test_shards_must_have_the_same_columns(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match="other columns"):
        open_source(tmp_path)
