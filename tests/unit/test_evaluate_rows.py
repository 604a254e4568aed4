"""Rows and tasks that are wrong are refused with their line, before any model."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.core.errors import UsageError
from prunekit.evaluate.images import pixels, read_images
from prunekit.evaluate.rows import PACKAGED, read_rows
from prunekit.evaluate.specs import parse_task

GOOD = {"context": "Q:", "choices": [" a", " b"], "label": 1}


def write(folder: Path, *rows: Any) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**GOOD, "label": 2}, "out of range"),
        ({**GOOD, "label": -1}, "out of range"),
        ({**GOOD, "label": "1"}, "whole number"),
        ({**GOOD, "label": True}, "whole number"),
        ({**GOOD, "choices": [" a", "  "]}, "empty text"),
        ({**GOOD, "choices": [" a"]}, "1 entries"),
        ({**GOOD, "choices": " ab"}, "list of texts"),
        ({**GOOD, "choices": [" a", 3]}, "list of texts"),
        ({"choices": [" a", " b"], "label": 0}, "`context` must be text"),
        ({"contexts": ["x", "y"], "label": 0}, "`continuation` must be text"),
        ({"contexts": ["x", ""], "continuation": " z", "label": 0}, "empty text"),
        ("{not json", "not JSON"),
        ("[1]", "no JSON object"),
    ],
)
def test_wrong_row_is_named_by_its_line(tmp_path: Path, row: Any, said: str) -> None:
    file = write(tmp_path, GOOD, "", row)
    with pytest.raises(UsageError, match=said) as caught:
        parse_task(f"multiple_choice:{file}").task.load()
    assert caught.value.at == f"{file}:3"


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("cloze", {"context": "a", "target": " "}, "`target` is empty"),
        ("similarity", {"s1": "a", "s2": "b", "score": "5"}, "`score` must be a number"),
        ("similarity", {"s1": "a", "s2": "b", "score": float("nan")}, "`score` must be a number"),
        ("probe", {"text": "", "label": 0}, "`text` is empty"),
        ("probe", {"text": "a", "label": 7}, "not in `subjectivity_train`"),
    ],
)
def test_wrong_row_of_other_tasks(tmp_path: Path, task: str, row: Any, said: str) -> None:
    file = write(tmp_path, row)
    with pytest.raises(UsageError, match=said) as caught:
        parse_task(f"{task}:{file}").task.load()
    assert caught.value.at == f"{file}:1"


@pytest.mark.parametrize(
    ("name", "said"), [("arc_esay", "did you mean `arc_easy`"), ("/no/such.jsonl", "")], ids=["near", "far"]
)
def test_missing_file(name: str, said: str) -> None:
    with pytest.raises(UsageError, match="no rows named") as caught:
        read_rows(name)
    assert said in caught.value.hint


def test_file_without_rows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no rows"):
        read_rows(str(write(tmp_path, "", " ")))


def test_limit_reads_no_further(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD, "{not json")
    assert len(read_rows(str(file), limit=1)) == 1


@pytest.mark.parametrize("name", PACKAGED)
def test_packaged_rows_are_sound(name: str) -> None:
    task = {"arc_easy": "multiple_choice", "lambada": "cloze"}.get(name, "probe")
    parse_task(f"{task}:{name}").task.load()
    assert len(read_rows(name)) == (100 if name == "subjectivity_dev" else 200)


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("perplexty", "no task named", "did you mean `perplexity`"),
        ("perplexity,lenght_tokens=3", "unknown key `lenght_tokens`", "did you mean `length_tokens`"),
        ("perplexity,sequences=0", "at least 1", ""),
        ("perplexity,sequences=two", "whole number", ""),
        ("perplexity,sequences", "is not option=value", ""),
        ("perplexity:a.txt,data=b.txt", "given twice", ""),
        ("arithmetic:x.jsonl", "takes no data", ""),
        ("similarity", "`data` is missing", ""),
        ("passkey,lengths=[3]", "at least 96", ""),
    ],
)
def test_wrong_task_is_refused(text: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        parse_task(text)
    assert hint in caught.value.hint
    assert caught.value.at == f"--task {text}"


def test_stride_as_long_as_a_window_is_refused() -> None:
    with pytest.raises(UsageError, match="as long as a window"):
        parse_task("perplexity,length_tokens=8,stride_tokens=8").task.load()


def test_lists_and_names_are_read() -> None:
    made = parse_task("passkey,lengths=[128, 256],name=keys", limit=3)
    assert (made.label, made.task.lengths, made.task.limit) == ("keys", (128, 256), 3)
    assert parse_task("multiple_choice:mc/some.set.jsonl").label == "some.set"
    assert parse_task("perplexity,sequences=4", limit=9).task.sequences == 4


def image(colour: tuple[int, int, int]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_images_come_alike_from_zip_and_folder_in_turn_by_class(tmp_path: Path) -> None:
    files = {f"{label}/{n}.png": image((40 * n, 0, 200 * (label == "b"))) for label in "ab" for n in range(3)}
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)
            (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / name).write_bytes(content)
        opened.writestr("readme.txt", "not an image")
    packed, loose = read_images(str(tmp_path / "set.zip")), read_images(str(tmp_path / "set"))
    assert [(p.label, p.content) for p in packed] == [(p.label, p.content) for p in loose]
    assert [p.label for p in read_images(str(tmp_path / "set.zip"), limit=4)] == ["a", "b", "a", "b"]
    found = pixels(packed[0], 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert found.shape == (3, 16, 16)
    assert torch.equal(found, torch.full_like(found, -1.0))


def test_wrong_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(UsageError, match="not a zip file"):
        read_images(str(tmp_path / "broken.zip"))
    with pytest.raises(UsageError, match="no images at"):
        read_images(str(tmp_path / "none"))
    (tmp_path / "set" / "a").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds no images"):
        read_images(str(tmp_path / "set"))
    (tmp_path / "set" / "a" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="no image that can be read") as caught:
        pixels(read_images(str(tmp_path / "set"))[0], 8, (0.0,) * 3, (1.0,) * 3)
    assert caught.value.at.endswith("a/0.jpg")
