"""Windows, sentences and images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from prunekit.calibrate.batches import image_batch, sentence_batch, token_batch
from prunekit.core.errors import UsageError


class Words:
    """A tokenizer whose token ids are 10 + the number at the end of each word; 1 and 2 frame a sentence."""

    eos_token_id = 2

    def __init__(self, pad_token_id: int | None = 0) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": [10 + int(word[1:]) for word in text.split()]}
        assert options["truncation"]
        assert add_special_tokens
        limit = options["max_length"]
        rows = [[1, *[10 + int(w[1:]) for w in line.split()][: limit - 2], 2] for line in text]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}


@pytest.fixture
def numbers(tmp_path: Path) -> str:
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(f"w{i}" for i in range(100)))
    return str(path)


@pytest.fixture
def lines(tmp_path: Path) -> str:
    path = tmp_path / "lines.txt"
    long = [" ".join(f"w{i}" for i in range(n)) for n in (9, 12, 20)]
    path.write_text("\n".join([" = w1 w2 w3 w4 w5 w6 w7 w8 = ", *long, "w1 w2", ""]))
    return str(path)


def test_token_batch_takes_contiguous_windows_from_the_start(numbers: str) -> None:
    found = token_batch(Words(), numbers, sequences=3, length_tokens=7)
    assert found.dtype == torch.int64
    assert found.tolist() == [[10 + 7 * i + j for j in range(7)] for i in range(3)]


def test_token_batch_with_a_seed_draws_windows_without_repeats(numbers: str) -> None:
    drawn = token_batch(Words(), numbers, 5, 7, seed=1)
    assert drawn.equal(token_batch(Words(), numbers, 5, 7, seed=1))
    assert not drawn.equal(token_batch(Words(), numbers, 5, 7, seed=2))
    starts = [int(row[0]) - 10 for row in drawn]
    assert len(set(starts)) == 5
    assert all(start % 7 == 0 for start in starts)
    assert all(row.tolist() == list(range(int(row[0]), int(row[0]) + 7)) for row in drawn)


def test_token_batch_refuses_a_short_text(numbers: str) -> None:
    assert token_batch(Words(), numbers, 14, 7).shape == (14, 7)
    with pytest.raises(UsageError, match="too short for 15 sequences of 7 tokens") as caught:
        token_batch(Words(), numbers, 15, 7)
    assert "100 tokens" in caught.value.why


def test_sentence_batch_pads_to_the_longest_and_passes_over_headings(lines: str) -> None:
    found = sentence_batch(Words(), lines, sequences=2, length_tokens=64)
    assert found["input_ids"].shape == (2, 14)
    assert found["input_ids"][0].tolist() == [1, *range(10, 19), 2, 0, 0, 0]
    assert found["attention_mask"].sum(dim=1).tolist() == [11, 14]


def test_sentence_batch_cuts_long_lines(lines: str) -> None:
    found = sentence_batch(Words(), lines, 3, length_tokens=6)
    assert found["input_ids"].tolist() == [[1, 10, 11, 12, 13, 2]] * 3


def test_sentence_batch_without_a_padding_token_pads_with_the_end(lines: str) -> None:
    assert sentence_batch(Words(pad_token_id=None), lines, 2, 64)["input_ids"][0, -1] == 2


def test_sentence_batch_refuses_too_few_lines(lines: str) -> None:
    with pytest.raises(UsageError, match="too few lines for 4 sequences"):
        sentence_batch(Words(), lines, 4, 64)


def test_image_batch_noise_comes_from_the_seed() -> None:
    first = image_batch("noise", 2, 3, 8, seed=5)["pixel_values"]
    assert first.shape == (2, 3, 8, 8)
    assert first.equal(image_batch("noise", 2, 3, 8, seed=5)["pixel_values"])
    assert not first.equal(image_batch("noise", 2, 3, 8, seed=6)["pixel_values"])


def test_image_batch_reads_a_file(tmp_path: Path) -> None:
    pixels = torch.randn(4, 3, 8, 8)
    save_file({"pixel_values": pixels}, tmp_path / "images.safetensors")
    assert image_batch(str(tmp_path / "images.safetensors"), 2, 3, 8)["pixel_values"].equal(pixels[:2])


def test_image_batch_of_videos_has_frames(tmp_path: Path) -> None:
    assert image_batch("noise", 2, 3, 8, frames=4)["pixel_values"].shape == (2, 4, 3, 8, 8)
    save_file({"pixel_values": torch.zeros(4, 3, 8, 8)}, tmp_path / "images.safetensors")
    with pytest.raises(UsageError, match=r"does not hold 2 images"):
        image_batch(str(tmp_path / "images.safetensors"), 2, 3, 8, frames=4)


def test_image_batch_refuses_what_does_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "images.safetensors"
    with pytest.raises(UsageError, match="no images named"):
        image_batch(str(path), 1, 3, 8)
    save_file({"pixel_values": torch.zeros(4, 3, 8, 8)}, path)
    with pytest.raises(UsageError, match="does not hold 2 images"):
        image_batch(str(path), 2, 3, 16)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="no tensor `pixel_values`"):
        image_batch(str(path), 1, 3, 8)
    path.write_bytes(b"not safetensors")
    with pytest.raises(UsageError, match="not a safetensors file"):
        image_batch(str(path), 1, 3, 8)
