"""What metrics may ask about a data set; each answer is worked out once, when first asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prunekit.checkpoint.cache import cache_folder
from prunekit.core.errors import EvaluationError, UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import Ranks
from prunekit.datasets.arrays import read_rows, shared_array
from prunekit.datasets.source import Source, class_counts

if TYPE_CHECKING:
    from prunekit.datasets.encoder import Encoder
    from prunekit.datasets.training import Learner, Outcome, Run

_BLOCK = 256


@dataclass(frozen=True)
class Settings:
    """How metrics work, beside their own knobs.

    Args:
        seed: of random numbers, of the first trained model, of k-means.
        trains: what the trained metrics train: a head on embeddings, or the whole small model.
        device: where models run: `cpu`, `cuda`.
        memory_mib: bound on the embeddings that are held in memory at once.
        cache: folder for embeddings and finished seeds; `$PRUNEKIT_CACHE` or `~/.cache/prunekit` by default.
    """

    seed: int = 0
    trains: Literal["head", "model"] = "head"
    device: str = "cpu"
    memory_mib: int = 1024
    cache: Path = field(default_factory=cache_folder)


@dataclass
class Examples:
    """A data set with the model that embeds it.

    Args:
        source: the data.
        encoder: the model; None where no metric needs one.
        settings: device, seed, memory.
        ranks: processes that share the work.
        progress: bars.
        asking: the metric that asks now, as errors name it.
    """

    source: Source
    encoder: Encoder | None
    settings: Settings
    ranks: Ranks = field(default_factory=Ranks)
    progress: Progress = NULL_PROGRESS
    asking: str = "this metric"

    @property
    def n(self) -> int:
        """Examples."""
        return self.source.n

    @property
    def labelled(self) -> bool:
        """Whether there is any label."""
        return self.source.codes is not None and bool((self.source.codes >= 0).any())

    @cached_property
    def labels(self) -> np.ndarray:
        """Class numbers, int32 [n].

        Raises:
            UsageError: if labels are missing, or all alike.
        """
        return self.require_labels()

    def require_labels(self) -> np.ndarray:
        """The labels, or an error before any metric has done its work.

        Raises:
            UsageError: if labels are missing, all alike, or all different.
        """
        codes, path = self.source.codes, self.source.opened.path
        hint = "metrics without labels: length, random, ssl_prototypes; with a causal --model: el2n, loss, perplexity"
        if codes is None or not self.labelled:
            raise UsageError(
                f"`{path}` has no labels", why=f"{self.asking} needs the class of every example", hint=hint
            )
        missing = int((codes < 0).sum())
        if missing:
            why = f"{self.asking} needs the class of every example"
            raise UsageError(f"{missing} of {self.n} examples of `{path}` have no label", why=why, hint=hint)
        if len(np.unique(codes)) < 2:
            why = f"every label is `{self.source.classes[int(codes[0])]}`"
            raise UsageError(f"`{path}` has a single class", why=why, hint=hint)
        if self.n > 2 and len(np.unique(codes)) == self.n:
            why = f"column `{self.source.label_column}` has another value in every row"
            raise UsageError(f"`{path}` holds no classes", why=why, hint="name the class: --label-column NAME")
        return codes

    @property
    def n_classes(self) -> int:
        """Classes."""
        return len(self.source.classes)

    def counts(self) -> dict[str, int]:
        """Examples of each class by name; empty without labels."""
        return {} if self.source.codes is None else class_counts(self.source.codes, self.source.classes)

    @property
    def model(self) -> Encoder:
        """The model."""
        if self.encoder is None:
            raise UsageError(f"{self.asking} needs a model", hint="--model NAME")
        return self.encoder

    @cached_property
    def embeddings_file(self) -> Path:
        """File of the embeddings, float32 [n, d]; made once for the same data and model.

        Raises:
            EvaluationError: if an embedding is not finite.
        """
        model, data = self.model, self.source
        file = self._cached(f"{embeddings_key(data, model)}.npy")
        if file.is_file():
            return file
        first = next(iter(data.blocks(1)))[1]
        width = model.vectors(first, data).shape[1]

        def fill(array: np.memmap) -> None:
            with self.progress.task("embedding", total=self.n / self.ranks.size, unit="examples") as task:
                for start, values in data.blocks(_BLOCK, self.ranks.mine):
                    found = model.vectors(values, data)
                    require_finite(found, start, model.source)
                    array[start : start + len(values)] = found
                    task.advance(len(values))

        return shared_array(file, (self.n, width), fill, self.ranks)

    @property
    def width(self) -> int:
        """Entries of an embedding."""
        return int(np.load(self.embeddings_file, mmap_mode="r").shape[1])

    def embedding_blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """Embeddings in blocks with their positions, float32 [rows, d]."""
        for start, block in read_rows(self.embeddings_file):
            require_finite(block, start, self.model.source)
            yield start, block

    @property
    def causal(self) -> bool:
        """Whether the model writes text from left to right."""
        return self.encoder is not None and self.encoder.causal

    def surprises(self) -> np.ndarray:
        """Mean loss in nats, and mean error norm, a token of every text under the causal model, float32 [n, 2]."""
        if self.source.kind != "text":
            raise UsageError(f"{self.asking} reads text", why="the data set holds images")
        model, data = self.model, self.source
        file = self._cached(f"surprises/{_key(data.digest, model.digest, model.max_tokens)}.npy")

        def fill(array: np.memmap) -> None:
            with self.progress.task("reading", total=self.n / self.ranks.size, unit="examples") as task:
                for start, values in data.blocks(64, self.ranks.mine):
                    array[start : start + len(values)] = model.surprises(values, data)
                    task.advance(len(values))

        return np.array(np.load(shared_array(file, (self.n, 2), fill, self.ranks)))

    def lengths(self) -> np.ndarray:
        """Length of every text in tokens, in words without a model, int32 [n]."""
        if self.source.kind != "text":
            raise UsageError(f"{self.asking} reads text", why="the data set holds images")
        found = np.zeros(self.n, np.int32)
        for start, values in self.source.blocks(1024):
            counted = [len(v.split()) for v in values] if self.encoder is None else self.encoder.counts(values)
            found[start : start + len(values)] = counted
        return found

    def train(self, run: Run, models: int) -> tuple[Outcome, ...]:
        """What `models` models, trained one a seed, say about every example."""
        from prunekit.datasets.training import trained

        what = (self.source.digest, self.model.digest, self.model.max_tokens, self.settings.trains)
        folder = self._cached(f"runs/{_key(*what)}")
        return trained(self._learner, run, models, self.settings.seed, folder, self.ranks, self.progress)

    def trained_params(self) -> int | None:
        """Weights of what learns the labels: a linear head, or the model; None without classes or embeddings."""
        if self.n_classes < 2 or "embeddings_file" not in vars(self):
            return None
        if self.settings.trains == "head":
            return (self.width + 1) * self.n_classes
        return sum(weight.numel() for weight in self.model.model.parameters())

    @cached_property
    def _learner(self) -> Learner:
        from prunekit.datasets.learners import head_learner, model_learner

        return head_learner(self) if self.settings.trains == "head" else model_learner(self)

    def _cached(self, name: str) -> Path:
        return self.settings.cache / "data" / name


def require_finite(block: np.ndarray, start: int, model: str) -> None:
    """Raises `EvaluationError` where a row holds NaN or infinity."""
    bad = np.flatnonzero(~np.isfinite(block).all(1))
    if len(bad):
        raise EvaluationError(
            f"the embedding of example {start + bad[0]} is not finite",
            why=f"`{model}` gives NaN or infinity, for {len(bad)} of {len(block)} examples of this block",
            hint="check the model's weights, and look at that example",
        )


def embeddings_key(data: Source, model: Encoder) -> str:
    """Name of the embeddings that a model gives a data set: the digests of both, and where texts are cut."""
    return f"embeddings/{_key(data.digest, model.digest, model.max_tokens)}"


def _key(*parts: Any) -> str:
    return hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:32]
