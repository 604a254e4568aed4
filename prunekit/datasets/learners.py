"""The two things that trained metrics train: a head on embeddings, or the whole small model."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from prunekit.core.errors import UsageError
from prunekit.datasets.arrays import shared_array
from prunekit.datasets.training import Head, Learner
from prunekit.modeling.quiet import quiet

if TYPE_CHECKING:
    from torch import nn

    from prunekit.datasets.examples import Examples

# Below this deviation a dimension of the embeddings is constant, and is not blown up.
_FLAT = 1e-6


def head_learner(data: Examples) -> Learner:
    """A head on standardised embeddings; always on the CPU, where it trains in a second."""
    # Labels first: where they are wrong, nothing is embedded.
    labels, n_classes = data.labels, data.n_classes
    mean, deviation = moments(data)

    def make(width: int) -> nn.Module:
        return Head(mean, deviation, n_classes, width)

    return Learner(make, {"x": np.load(data.embeddings_file, mmap_mode="r")}, labels, n_classes)


def moments(data: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each dimension, float32 [d]; one pass in float64."""
    total = square = np.zeros(data.width)
    for _, block in data.embedding_blocks():
        wide = block.astype(np.float64)
        total, square = total + wide.sum(0), square + (wide**2).sum(0)
    mean = total / data.n
    deviation = np.sqrt(np.maximum(square / data.n - mean**2, 0))
    deviation[deviation < _FLAT] = 1.0
    return torch.tensor(mean, dtype=torch.float32), torch.tensor(deviation, dtype=torch.float32)


def model_learner(data: Examples) -> Learner:
    """The whole model with a fresh classification head; its inputs are made once and kept in the cache."""
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    encoder, labels, n_classes = data.model, data.labels, data.n_classes
    auto = AutoModelForImageClassification if data.source.kind == "image" else AutoModelForSequenceClassification

    def make(width: int) -> nn.Module:
        with quiet():
            try:
                model, info = auto.from_pretrained(
                    encoder.folder,
                    num_labels=n_classes,
                    local_files_only=True,
                    dtype=torch.float32,
                    # The head of another task has another size; it is what is trained anew.
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
            except (ValueError, KeyError) as error:
                why = " ".join(str(error).split())[:200]
                raise UsageError(
                    f"`{encoder.source}` cannot become a classifier", why=why, hint="--train head"
                ) from error
        body = model.base_model_prefix + "."
        keys = [key if isinstance(key, str) else key[0] for key in info["mismatched_keys"]]
        wrong = [key for key in keys if key.startswith(body)]
        if wrong:
            raise UsageError(f"`{encoder.source}` has another shape for `{wrong[0]}` than its configuration says")
        if getattr(model.config, "pad_token_id", 0) is None:
            model.config.pad_token_id = encoder.tokenizer.pad_token_id
        return cast("nn.Module", model)

    return Learner(make, _inputs(data), labels, n_classes, encoder.device)


def _inputs(data: Examples) -> dict[str, np.ndarray]:
    """Model inputs of all examples as memory maps: token ids and masks, or pixels in float16."""
    encoder, source = data.model, data.source
    pad_to = encoder.limit if source.kind == "text" else None
    sample = encoder.inputs(next(iter(source.blocks(1)))[1], source, pad_to)
    found = {}
    for name, first in sample.items():
        dtype = "float16" if first.is_floating_point() else "int64"
        file = data.embeddings_file.with_suffix(f".{name}.npy")

        def fill(array: np.memmap, name: str = name) -> None:
            for start, values in source.blocks(64, data.ranks.mine):
                array[start : start + len(values)] = encoder.inputs(values, source, pad_to)[name].numpy()

        shared_array(file, (source.n, *first.shape[1:]), fill, data.ranks, dtype)
        found[name] = np.load(file, mmap_mode="r")
    return found
