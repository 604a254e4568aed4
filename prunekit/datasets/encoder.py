"""A local model as the data set's examples meet it: vectors, token counts, losses, inputs to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunekit.checkpoint.digest import model_digest
from prunekit.checkpoint.sources import resolve
from prunekit.core.errors import UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.modeling.load import load_model, load_tokenizer
from prunekit.modeling.pooling import masked_mean
from prunekit.modeling.quiet import quiet

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.datasets.source import Source

TEXT_MODEL = "all-minilm-l6-v2"
IMAGE_MODEL = "dinov2-small-focus"
_AT_ONCE = 32


@dataclass(frozen=True)
class Encoder:
    """A model folder, loaded when first asked.

    Args:
        source: as the user named it.
        folder: Hugging Face folder.
        device: where it runs.
        max_tokens: longer texts are cut.
    """

    source: str
    folder: Path
    device: str = "cpu"
    max_tokens: int = 256

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything in the folder that can change a number."""
        return model_digest(self.folder)

    @cached_property
    def model(self) -> Any:
        """The model with its head, in eval mode, float32."""
        return load_model(self.folder, device=self.device)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            UsageError: where the folder holds none.
        """
        found = load_tokenizer(self.folder)
        if found is None:
            raise UsageError(f"`{self.source}` has no tokenizer", why="the data set is text")
        if found.pad_token_id is None:
            found.pad_token = found.eos_token
        return found

    @cached_property
    def processor(self) -> Any:
        """What makes pixels of images: the folder's own, or resizing and ImageNet's mean and deviation."""
        from transformers import AutoImageProcessor
        from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

        with quiet():
            if (self.folder / "preprocessor_config.json").is_file():
                return AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
            side = self.model.config.image_size
            return ViTImageProcessorPil(
                size={"height": side, "width": side}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
            )

    def inputs(self, values: Sequence[Any], data: Source, pad_to: int | None = None) -> dict[str, Tensor]:
        """Inputs of the model for texts or images of a block.

        Args:
            pad_to: length in tokens to pad to; None pads to the longest.
        """
        import torch

        if data.kind == "image":
            with quiet():
                made = self.processor(images=data.decoded(values), return_tensors="pt")
            return {"pixel_values": made["pixel_values"]}
        rule: dict[str, Any] = {"padding": True} if pad_to is None else {"padding": "max_length"}
        made = self.tokenizer(list(values), truncation=True, max_length=pad_to or self.limit, **rule)
        return {name: torch.tensor(part) for name, part in made.items() if name != "token_type_ids"}

    @property
    def limit(self) -> int:
        """Longest text in tokens."""
        longest = getattr(self.model.config, "max_position_embeddings", None) or self.max_tokens
        return min(self.max_tokens, longest)

    def vectors(self, values: Sequence[Any], data: Source) -> np.ndarray:
        """Embeddings of a block, float32 [n, hidden]: the mean over tokens, or the first position of images.

        Texts run in the order of their length, which saves padding and depends on nothing outside the block.
        """
        import torch

        order = sorted(range(len(values)), key=lambda place: len(values[place])) if data.kind == "text" else None
        order = order or list(range(len(values)))
        parts: list[Tensor] = []
        for first in range(0, len(order), _AT_ONCE):
            inputs = self.inputs([values[place] for place in order[first : first + _AT_ONCE]], data)
            inputs = {name: part.to(self.device) for name, part in inputs.items()}
            with torch.no_grad():
                hidden = self.model.base_model(**inputs).last_hidden_state.float()
            parts.append(pooled(hidden, inputs.get("attention_mask")).cpu())
        found = torch.cat(parts)
        return found[torch.argsort(torch.tensor(order))].numpy()

    @cached_property
    def causal(self) -> bool:
        """Whether the model writes text from left to right."""
        return is_causal(self.model)

    def surprises(self, values: Sequence[str], data: Source) -> np.ndarray:
        """What each text is to a causal model, float32 [n, 2], as `surprises` gives it.

        Raises:
            UsageError: if the model writes no text.
        """
        if not self.causal:
            hint = "name one: --model smollm2-135m-instruct"
            raise UsageError(f"`{self.source}` gives no loss to text", why="it is no causal language model", hint=hint)
        found = np.zeros((len(values), 2), np.float32)
        order = sorted(range(len(values)), key=lambda place: len(values[place]))
        for first in range(0, len(order), 8):
            places = order[first : first + 8]
            inputs = self.inputs([values[place] for place in places], data)
            inputs = {name: part.to(self.device) for name, part in inputs.items()}
            found[places] = surprises(self.model, inputs)
        return found

    def counts(self, values: Sequence[str]) -> np.ndarray:
        """Tokens of each text without special ones, int32 [n]; nothing is cut."""
        made = self.tokenizer(list(values), add_special_tokens=False, verbose=False)["input_ids"]
        return np.array([len(ids) for ids in made], np.int32)


def encoder(
    name: str | None, data: Source, device: str, max_tokens: int, progress: Progress = NULL_PROGRESS
) -> Encoder:
    """The model of a name; MiniLM for text and a DINOv2-small for images where none is given.

    Raises:
        CheckpointError: if there is no such model, or its package is not installed.
    """
    named = name or (TEXT_MODEL if data.kind == "text" else IMAGE_MODEL)
    return Encoder(named, resolve(named, progress=progress).folder, device, max_tokens)


def pooled(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of hidden states [n, length, d] over positions of the mask, or the first position without one: [n, d]."""
    return hidden[:, 0] if mask is None else masked_mean(hidden, mask)


def is_causal(model: Any) -> bool:
    """Whether a model writes text from left to right."""
    return hasattr(model, "lm_head") and not getattr(model.config, "is_encoder_decoder", False)


def surprises(model: Any, inputs: Mapping[str, Tensor]) -> np.ndarray:
    """Cross-entropy in nats and error ||softmax - onehot||_2 of each sequence, float32 [n, 2].

    Both are means over its tokens but the first, which nothing predicts; 0 for a single token. Probabilities 0.7 and
    0.3 where the second is right: 1.204 and 0.9899.
    """
    import torch

    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))[:, 1:].float()
    with torch.no_grad():
        logits = model(**inputs).logits
    found = []
    # One by one, since what has the size of the vocabulary is made several times over.
    for one, label, seen in zip(logits[:, :-1], ids[:, 1:], mask, strict=True):
        logs = one.float().log_softmax(-1)
        right = logs.gather(-1, label[:, None])[:, 0]
        error = (logs.exp().square().sum(-1) - 2 * right.exp() + 1).clamp(min=0).sqrt()
        found.append(torch.stack([-right @ seen, error @ seen]) / seen.sum().clamp(min=1))
    both: np.ndarray = torch.stack(found).cpu().numpy()
    return both
