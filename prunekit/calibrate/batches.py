"""Tokenised batches: windows of running text for decoders, sentences for encoders, images for vision models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.calibrate.texts import load_text
from prunekit.core.errors import UsageError

# Shorter lines are headings and captions; an embedding of three words says little about a model.
_SHORTEST_SENTENCE_WORDS = 8


def token_batch(tokenizer: Any, data: str, sequences: int | None, length_tokens: int, seed: int = 0) -> Tensor:
    """Windows of running text that do not overlap, without special tokens.

    Args:
        tokenizer: of the model, as transformers loads it.
        data: name or path, as `load_text` takes it.
        sequences: how many windows; None takes all there are, at least one.
        length_tokens: tokens in each window.
        seed: 0 takes the windows from the start of the text; above 0 draws which windows of the text to take.
    Returns:
        int64 [sequences, length_tokens].
    Raises:
        UsageError: when the text has too few tokens.
    """
    ids = torch.tensor(_encode(tokenizer, load_text(data)), dtype=torch.int64)
    windows = ids.numel() // length_tokens
    sequences = max(1, windows) if sequences is None else sequences
    if windows < sequences:
        raise UsageError(
            f"`{data}` is too short for {sequences} sequences of {length_tokens} tokens",
            why=f"it has {ids.numel():,} tokens, which make {windows} sequences",
            hint="lower `sequences` or `length_tokens`, or give a longer text",
        )
    ids = ids[: windows * length_tokens].view(windows, length_tokens)
    return ids[_chosen(windows, sequences, seed)].clone()


def sentence_batch(
    tokenizer: Any, data: str, sequences: int | None, length_tokens: int, seed: int = 0
) -> dict[str, Tensor]:
    """Lines of a text as an encoder reads them: special tokens added, padded on the right to the longest.

    Args:
        tokenizer: of the model; without a padding token its end token pads.
        data: name or path, as `load_text` takes it. Headings (` = Title = `) and lines under 8 words are passed over.
        sequences: how many lines; None takes all there are, at least one.
        length_tokens: longest line in tokens, special tokens included; longer ones are cut.
        seed: 0 takes the first lines; above 0 draws them.
    Returns:
        `input_ids` and `attention_mask`, int64 [sequences, at most length_tokens], and `token_type_ids` where the
        tokenizer makes them.
    Raises:
        UsageError: when the text has too few lines.
    """
    lines = [line.strip() for line in load_text(data).split("\n")]
    lines = [x for x in lines if not x.startswith("= ") and len(x.split()) >= _SHORTEST_SENTENCE_WORDS]
    sequences = max(1, len(lines)) if sequences is None else sequences
    if len(lines) < sequences:
        raise UsageError(
            f"`{data}` has too few lines for {sequences} sequences",
            why=f"{len(lines)} lines have {_SHORTEST_SENTENCE_WORDS} words or more",
            hint="lower `sequences`, or give a longer text with one sentence or paragraph a line",
        )
    chosen = [lines[i] for i in _chosen(len(lines), sequences, seed).tolist()]
    encoded = tokenizer(chosen, truncation=True, max_length=length_tokens)
    return _padded(encoded, tokenizer)


def image_batch(
    data: str, images: int, channels: int, size: int, seed: int = 0, frames: int | None = None
) -> dict[str, Tensor]:
    """Pixels for a vision model.

    Args:
        data: `noise` (standard normal pixels drawn from `seed`), or a .safetensors file whose tensor `pixel_values`
            [images, channels, size, size], of videos [videos, frames, channels, size, size], is preprocessed as the
            model expects it.
        images: how many.
        channels: colour channels of the model.
        size: height and width in pixels.
        seed: draws the noise; for a file, 0 takes the first images and above 0 draws them.
        frames: of each video; None for images.
    Returns:
        `pixel_values`, float32 [images, channels, size, size] or [videos, frames, channels, size, size].
    Raises:
        UsageError: when the file does not hold such images, or too few.
    """
    shape = (channels, size, size) if frames is None else (frames, channels, size, size)
    if data == "noise":
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(images, *shape, generator=generator)}
    if Path(data).suffix != ".safetensors" or not Path(data).is_file():
        raise UsageError(f"no images named `{data}`", why="images are `noise` or a .safetensors file")
    pixels = _pixels(Path(data))
    if tuple(pixels.shape[1:]) != shape or pixels.shape[0] < images:
        raise UsageError(
            f"`{data}` does not hold {images} images for this model",
            why=f"its pixel_values are {list(pixels.shape)}, the model reads {[images, *shape]}",
        )
    return {"pixel_values": pixels[_chosen(pixels.shape[0], images, seed)].float()}


def _pixels(path: Path) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            if "pixel_values" not in file.keys():  # noqa: SIM118 (safe_open has no __contains__)
                raise UsageError(f"`{path}` has no tensor `pixel_values`")
            return file.get_tensor("pixel_values")
    except SafetensorError as error:
        raise UsageError(f"`{path}` is not a safetensors file", why=str(error)) from error


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: the text is longer than the model on purpose, so the tokenizer's length warning would mislead.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _chosen(available: int, wanted: int, seed: int) -> Tensor:
    """Indices int64 [wanted], ascending from 0, or drawn without repeats when `seed` is above 0."""
    if seed == 0:
        return torch.arange(wanted)
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted]


def _padded(encoded: Mapping[str, list[list[int]]], tokenizer: Any) -> dict[str, Tensor]:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = encoded["input_ids"]
    longest = max(len(row) for row in rows)
    fill = {"input_ids": pad or 0, "attention_mask": 0, "token_type_ids": 0}
    batch = {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    if "token_type_ids" in encoded:
        batch["token_type_ids"] = encoded["token_type_ids"]
    return {
        name: torch.tensor([row + [fill[name]] * (longest - len(row)) for row in part], dtype=torch.int64)
        for name, part in batch.items()
    }
