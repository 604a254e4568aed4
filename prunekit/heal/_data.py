"""The data of healing: texts mixed by weight, windows or sentences, a part of them held out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunekit.calibrate.batches import sentence_batch, token_batch
from prunekit.core.errors import UsageError
from prunekit.heal._kept import bytes_digest, kept, key_of, parts
from prunekit.heal._sample import sampled
from prunekit.heal.scene import Scene

if TYPE_CHECKING:
    from prunekit.core.recipe_heal import HealText

TEACHER = "teacher"


@dataclass(frozen=True)
class Data:
    """Rows to learn from.

    Args:
        inputs: of the model by name, int64 [rows, T].
        train: numbers of the rows trained on, a multiple of the batch.
        held_out: numbers of those watched; empty where none are.
        digest: of all of it.
        shares: rows of each text.
    """

    inputs: Mapping[str, Tensor]
    train: Tensor
    held_out: Tensor
    digest: str
    shares: tuple[int, ...]


def gather(scene: Scene) -> Data:
    """The mixture that the recipe asks for.

    Raises:
        UsageError: where a text is missing, empty or too short, or what is left is less than a batch.
    """
    asked = scene.asked
    texts = [None if text.data == TEACHER else _rows(scene, text.data) for text in asked.data]
    counts = _counts(scene, texts)
    found: list[Mapping[str, Tensor]] = []
    for number, (text, rows, count) in enumerate(zip(asked.data, texts, counts, strict=True)):
        if rows is None:
            rows = {"input_ids": _written(scene, text, count, asked.seed + number)}
        order = torch.randperm(len(rows["input_ids"]), generator=_generator(asked.seed + number))
        if text.data == TEACHER or scene.choose is None:
            found.append({name: values[order[:count]] for name, values in rows.items()})
        else:
            found.append(scene.choose({name: values[order] for name, values in rows.items()}, count))
    inputs = _joined(found)
    order = torch.randperm(sum(counts), generator=_generator(asked.seed))
    n_held = max(1, round(asked.held_out * len(order))) if asked.held_out else 0
    n_train = (len(order) - n_held) // asked.batch * asked.batch
    if not n_train:
        raise UsageError(
            f"{len(order)} sequences do not make a batch of {asked.batch}",
            why=f"{n_held} of them are held out" if n_held else "",
            hint="give more text, shorter `length_tokens`, or a smaller `batch`",
        )
    digest = key_of(**inputs, held_out=n_held, seed=asked.seed)
    return Data(inputs, order[n_held : n_held + n_train], order[:n_held], digest, tuple(counts))


def _rows(scene: Scene, name: str) -> Mapping[str, Tensor]:
    """All rows of a text."""
    length = scene.asked.length_tokens
    if scene.decoder:
        return {"input_ids": token_batch(scene.tokenizer, name, None, length)}
    return sentence_batch(scene.tokenizer, name, None, length)


def _counts(scene: Scene, texts: list[Mapping[str, Tensor] | None]) -> list[int]:
    """Rows of each text: as many as asked, or as many as the texts hold without repeating one, or as a run can use."""
    asked = scene.asked
    total = sum(text.weight for text in asked.data)
    shares = [text.weight / total for text in asked.data]
    keep = asked.select.keep if asked.select is not None else 1.0
    there = [None if rows is None else int(len(rows["input_ids"]) * keep + 1e-9) for rows in texts]
    n = asked.sequences
    if n is None:
        useful = math.ceil(asked.steps * asked.batch / (1 - asked.held_out)) + len(shares)
        whole = [int(held / share) for held, share in zip(there, shares, strict=True) if held is not None]
        n = min([useful, *whole])
    counts = [max(1, round(n * share)) for share in shares]
    for text, held, count in zip(asked.data, there, counts, strict=True):
        if held is not None and count > held:
            raise UsageError(
                f"`{text.data}` is too short for {count} sequences of {asked.length_tokens} tokens",
                why=f"it makes {held}" + (f" with `select.keep: {keep:g}`" if keep < 1 else ""),
                hint="lower `sequences`, `length_tokens` or its `weight`, or give a longer text",
            )
    return counts


def _written(scene: Scene, text: HealText, count: int, seed: int) -> Tensor:
    """Text that the teacher writes, int64 [count, T], from the cache where it was written before."""
    asked = scene.asked
    prompts = None
    if text.prompts is not None:
        prompts = token_batch(scene.tokenizer, text.prompts, count, text.prompt_tokens, seed)
        if text.prompt_tokens >= asked.length_tokens:
            raise UsageError(
                f"prompts of {text.prompt_tokens} tokens leave nothing to write",
                why=f"sequences have {asked.length_tokens} tokens",
                hint="lower `prompt_tokens`",
            )
    begins = "bos" if prompts is None else bytes_digest(prompts)
    key = key_of(teacher=scene.teacher_digest, n=count, length=asked.length_tokens, seed=seed, begins=begins,
                 dtype=asked.dtype)  # fmt: skip
    files = kept(scene.cached("text", key), lambda: _parts(scene, count, prompts, seed))
    return torch.cat([part["input_ids"] for part in parts(files)])


def _parts(scene: Scene, count: int, prompts: Tensor | None, seed: int) -> Iterator[dict[str, Tensor]]:
    for ids in sampled(scene, count, prompts, seed):
        yield {"input_ids": ids}


def _joined(found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all texts under each other; shorter ones are padded on the right as their own padding is."""
    width = max(rows["input_ids"].shape[1] for rows in found)

    def wide(values: Tensor, fill: int) -> Tensor:
        return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

    return {name: torch.cat([wide(rows[name], 0) for rows in found]) for name in found[0]}


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
