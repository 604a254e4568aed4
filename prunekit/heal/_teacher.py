"""What the teacher says about the data: computed at every step, or kept on disk as its most likely tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunekit.heal._kept import kept, key_of
from prunekit.heal._losses import Top, top
from prunekit.heal.scene import TOKENS_AT_ONCE, Scene


@dataclass(frozen=True)
class Online:
    """A teacher in memory.

    Args:
        model: in eval mode.
        options: further arguments of it.
    """

    model: Any
    options: Mapping[str, Any]

    def __call__(self, inputs: Mapping[str, Tensor]) -> Any:
        """Its outputs."""
        with torch.no_grad():
            return self.model(**inputs, **self.options)


class Cached:
    """The teacher's most likely tokens on disk, float16 and 2 or 4 bytes a token number.

    Args:
        files: one a part of the rows.
        rows: in each file.
    """

    def __init__(self, files: list[Path], rows: int) -> None:
        self._files, self._rows = files, rows

    def __call__(self, rows: Tensor) -> Top:
        """What it says about rows of the data, on the CPU."""
        from safetensors import safe_open

        values, tokens = [], []
        for row in rows.tolist():
            with safe_open(str(self._files[row // self._rows]), "pt") as file:
                place = row % self._rows
                values.append(file.get_slice("log_probs")[place : place + 1])
                tokens.append(file.get_slice("tokens")[place : place + 1])
        return Top(torch.cat(values).float(), torch.cat(tokens).long())


def cached(scene: Scene, ids: Tensor, k: int, temperature: float) -> Cached:
    """Asks the teacher once about all of the data, unless that was done before.

    Args:
        scene: the teacher.
        ids: all rows of the data, int64 [rows, T].
        k: tokens kept at each place.
        temperature: of the softmax whose values are kept.
    """
    asked, size = scene.asked, max(1, TOKENS_AT_ONCE // ids.shape[1])
    key = key_of(teacher=scene.teacher_digest, ids=ids, k=k, temperature=temperature, dtype=asked.dtype, rows=size)

    def make() -> Iterator[dict[str, Tensor]]:
        model = scene.load_teacher()
        scene.talk(f"keeping the teacher's {k} most likely tokens in the cache")
        with scene.progress.task("asking the teacher", total=len(ids), unit="sequences") as task, torch.no_grad():
            for part in ids.split(size):
                found = top(model(input_ids=part.to(model.device), use_cache=False).logits, k, temperature)
                small = torch.uint16 if model.config.get_text_config().vocab_size <= 1 << 16 else torch.int32
                yield {"log_probs": found.log_probs.half().cpu(), "tokens": found.tokens.cpu().to(small)}
                task.advance(len(part))

    return Cached(kept(scene.cached("tokens", key), make), size)
