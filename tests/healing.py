"""Small healings: a tiny model, cut, with a tokenizer of 64 characters and a text to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunekit.core.recipe_heal import Heal
from prunekit.heal.scene import Scene, matches
from prunekit.modeling.load import load_model
from prunekit.plan.plan import Plan
from prunekit.structure.view import ModelView
from prunekit.surgery import engine
from tests.tiny import VOCAB, write_tiny

SHORT = {"steps": 4, "batch": 4, "length_tokens": 12, "sequences": 24, "check_every": 2, "lr": 3e-3, "held_out": 0.2}
DROP = ("blocks.1.attention", "blocks.2.ffn")


class Characters:
    """A tokenizer whose tokens are characters."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id = 0

    def __call__(self, text: str | Sequence[str], **options: Any) -> dict[str, Any]:
        if isinstance(text, str):
            return {"input_ids": [3 + ord(c) % (VOCAB - 3) for c in text]}
        return {"input_ids": [self(line)["input_ids"][: options["max_length"]] for line in text]}

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(VOCAB)}


@dataclass
class Bench:
    """A dense and a cut folder, and how to make a scene of them."""

    dense: Path
    cut: Path
    text: Path
    pairs: Any
    cache: Path

    def scene(self, decoder: bool = True, **asked: Any) -> Scene:
        """A healing with a few settings of its own."""
        heal = Heal.model_validate({"method": "distill", "data": str(self.text), **SHORT, **asked})
        return Scene(
            asked=heal,
            student=self.cut,
            teacher=self.dense,
            load_teacher=lambda: load_model(self.dense, heal.dtype),
            tokenizer=Characters(),
            decoder=decoder,
            device="cpu",
            matches=matches(self.pairs, 4),
            cache=self.cache,
            talk=lambda text: None,
        )


def bench(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, drop: Sequence[str] = DROP, **changes: Any
) -> Bench:
    """Writes the models and the text into a folder."""
    dense = write_tiny(family, folder / "dense", dtype=dtype, **changes)
    view = ModelView.open(dense)
    (folder / "cut").mkdir()
    layout = engine.apply(view, Plan.make(view, drop), folder / "cut")
    text = folder / "text.txt"
    lines = [f"line {i} of a text that has many words and says nothing at all {i * i}" for i in range(40)]
    text.write_text("\n".join(lines))
    return Bench(dense, folder / "cut", text, layout.pairs, folder / "cache")


def without_teacher(scene: Scene) -> Scene:
    """The same where asking the teacher fails."""

    def load() -> Any:
        raise AssertionError("the teacher was asked")

    return replace(scene, load_teacher=load)
