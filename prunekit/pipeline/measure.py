"""Quality and speed of one model by a recipe's `evaluate` section."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.progress import Progress
from prunekit.modeling.load import load_model
from prunekit.pipeline.inputs import device_of, dtype_of, model_batch, reads

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Embedding, Latency, Perplexity, Recipe
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
        if asked.perplexity is not None:
            found["perplexity"] = self._perplexity(model, asked.perplexity)
        if asked.embedding is not None:
            found["embedding_cosine"] = self._embedding(model, dense, asked.embedding)
        if asked.latency is not None:
            found |= self._latency(model, asked.latency)
        if asked.sample is not None:
            from prunekit.evaluate.sample import continuation

            found["sample"] = continuation(model, self.tokenizer, asked.sample.prompt, asked.sample.new_tokens)
        return found

    def _perplexity(self, model: Any, asked: Perplexity) -> float:
        from prunekit.calibrate.batches import token_batch
        from prunekit.evaluate.perplexity import perplexity

        ids = token_batch(self.tokenizer, asked.data, asked.sequences, asked.length_tokens)
        return perplexity(model, ids, progress=self.progress).perplexity

    def _embedding(self, model: Any, dense: Any, asked: Embedding) -> float:
        from prunekit.evaluate.embedding import embedding_cosine, feature_cosine

        compare = feature_cosine if reads(self.view) == "images" else embedding_cosine
        return compare(dense, model, model_batch(self.view, self.tokenizer, asked), progress=self.progress).mean

    def _latency(self, model: Any, asked: Latency) -> dict[str, Any]:
        from prunekit.evaluate.latency import measure_latency

        done = measure_latency(
            model, asked.batch, asked.prompt_tokens, asked.new_tokens, asked.repeats, progress=self.progress
        )
        return {"prefill_tokens_s": done.prefill_tokens_s, "decode_tokens_s": done.decode_tokens_s}
