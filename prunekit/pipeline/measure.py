"""Quality and speed of one model by a recipe's `evaluate` section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.progress import Progress
from prunekit.modeling.load import load_model
from prunekit.pipeline.inputs import device_of, dtype_of, model_batch, reads

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.core.recipe_evaluate import KL, Embedding
    from prunekit.core.recipe_model import Recipe
    from prunekit.evaluate.results import Measured
    from prunekit.evaluate.specs import Asked
    from prunekit.evaluate.subject import Subject
    from prunekit.structure.view import ModelView


@dataclass(frozen=True)
class Measurer:
    """Measures the model before and after the cut in the same way.

    Args:
        recipe: what to measure.
        view: the model before the cut.
        tokenizer: of both models; None where nothing needs one.
        progress: bars.
    """

    recipe: Recipe
    view: ModelView
    tokenizer: Any
    progress: Progress

    def load(self, folder: Path) -> Any:
        """A model on the recipe's device."""
        device = device_of(self.recipe)
        dtype = dtype_of(self.recipe, self.view, device)
        return load_model(folder, dtype, device, self.recipe.model.trust_remote_code)

    def measure(self, model: Any, dense: Any) -> dict[str, Any]:
        """Values by the names that tables and `expect` know.

        Args:
            model: the one to measure.
            dense: the model before the cut, which embeddings are compared with; may be the same.
        """
        asked = self.recipe.evaluate
        found: dict[str, Any] = {}
        subject = subject_of(self.recipe, self.view, self.tokenizer, model)
        for entry in self._run(sections_of(self.recipe), subject):
            known = _SECTIONS[entry.asked.name]
            found |= {name: figure.value for name, figure in entry.figures.items() if name in known}
        figures = {
            f"{entry.asked.label}.{name}": figure.value
            for entry in self._run(tasks_of(self.recipe), subject)
            for name, figure in entry.figures.items()
        }
        if figures:
            found["figures"] = figures
        if asked.kl is not None and model is not dense:
            found["kl"] = self._kl(subject, dense, asked.kl)
        if asked.embedding is not None:
            found["embedding_cosine"] = self._embedding(model, dense, asked.embedding)
        if asked.sample is not None:
            from prunekit.evaluate.sample import continuation

            found["sample"] = continuation(model, self.tokenizer, asked.sample.prompt, asked.sample.new_tokens)
        return found

    def _run(self, tasks: list[Asked], subject: Subject) -> list[Measured]:
        from prunekit.evaluate.run import check, measure

        (work,) = check([(subject, tasks)])
        return [measure(task, prepared, subject, self.progress) for task, _, prepared in work.tasks]

    def _kl(self, subject: Subject, dense: Any, asked: KL) -> float:
        from prunekit.evaluate.divergence import divergence

        first = subject_of(self.recipe, self.view, self.tokenizer, dense)
        windows = kl_windows(subject, asked)
        return divergence(first, subject, windows, asked.data, passages=0, progress=self.progress).mean.value

    def _embedding(self, model: Any, dense: Any, asked: Embedding) -> float:
        from prunekit.evaluate.embedding import embedding_cosine, feature_cosine

        compare = feature_cosine if reads(self.view) == "images" else embedding_cosine
        return compare(dense, model, model_batch(self.view, self.tokenizer, asked), progress=self.progress).mean


def kl_windows(subject: Subject, asked: KL) -> Tensor:
    """Windows of text on which next-token distributions are compared, int64 [n, tokens].

    Raises:
        UsageError: for data that is missing, or windows longer than the model reads.
    """
    from prunekit.calibrate.batches import token_batch

    subject.require_positions(asked.length_tokens, "a window of `evaluate.kl`", hint="lower `length_tokens`")
    return token_batch(subject.tokenizer, asked.data, asked.sequences, asked.length_tokens)


# Sections of `evaluate` that are tasks, and which of their figures tables and `expect` know.
_SECTIONS = {"perplexity": ("perplexity",), "latency": ("prefill_tokens_s", "decode_tokens_s")}


def sections_of(recipe: Recipe) -> list[Asked]:
    """The tasks that sections of a recipe's `evaluate` stand for."""
    from prunekit.evaluate.specs import asked

    sections = {name: getattr(recipe.evaluate, name) for name in _SECTIONS}
    return [asked(name, part.model_dump()) for name, part in sections.items() if part is not None]


def tasks_of(recipe: Recipe) -> list[Asked]:
    """The tasks that a recipe lists under `evaluate.tasks`."""
    from prunekit.evaluate.specs import asked

    return [asked(entry.task, entry.options, entry.name) for entry in recipe.evaluate.tasks or ()]


def subject_of(recipe: Recipe, view: ModelView, tokenizer: Any, model: Any = None) -> Subject:
    """The model as tasks take it.

    Args:
        recipe: says the device and the type.
        view: the model before the cut.
        tokenizer: of it.
        model: loaded, in eval mode; None where only data is checked.
    """
    from prunekit.evaluate.subject import Subject, rows_at_once

    device = device_of(recipe)
    return Subject(
        name=recipe.model.source,
        folder=view.checkpoint.folder,
        config=view.config,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype_of(recipe, view, device),
        batch_size=rows_at_once(device),
        loaded=model,
    )
