"""Perplexity of running text, in windows that start afresh or slide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError
from prunekit.evaluate.figures import Figure

if TYPE_CHECKING:
    from prunekit.core.progress import Progress
    from prunekit.evaluate.subject import Subject


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Perplexity:
    """exp of the mean negative log-likelihood of a token. Without a stride no window sees text before its first token.

    Args:
        data: `wikitext2_eval`, `wikitext2`, a .txt or .jsonl file (field `text`), or a saved data set's folder.
        sequences: windows, from the start of the text.
        length_tokens: tokens in a window.
        stride_tokens: by how much a window lies behind the one before: tokens that both hold are scored once, in the
            first; null lets windows start afresh, one behind the other.
    """

    data: Annotated[str, Field(min_length=1, strict=True)] = "wikitext2_eval"
    sequences: Annotated[int, Field(ge=1, strict=True)] = 20
    length_tokens: Annotated[int, Field(ge=2, strict=True)] = 512
    stride_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None

    reads: ClassVar[tuple[str, ...]] = ("text",)
    backends: ClassVar[tuple[str, ...]] = ("torch", "onnx")
    limits: ClassVar[str] = "sequences"
    machine_bound: ClassVar[bool] = False
    version: ClassVar[int] = 1
    figures: ClassVar[tuple[str, ...]] = ("perplexity",)

    def load(self) -> str:
        """The text."""
        from prunekit.calibrate.texts import load_text

        if self.stride_tokens is not None and self.stride_tokens >= self.length_tokens:
            why = f"windows have {self.length_tokens} tokens and must overlap"
            hint = "take it out: windows then start afresh"
            raise UsageError(f"`stride_tokens: {self.stride_tokens}` is as long as a window", why=why, hint=hint)
        return load_text(self.data)

    def prepare(self, data: str, subject: Subject) -> tuple[Any, Any]:
        """Windows int64 [n, tokens], and how many tokens at the end of each count; None for all but the first."""
        import torch

        from prunekit.calibrate.batches import token_batch
        from prunekit.evaluate.perplexity import sliding_windows

        subject.require_positions(self.length_tokens, f"a window of `{self.data}`", hint="lower `length_tokens`")
        if self.stride_tokens is None:
            return token_batch(subject.tokenizer, self.data, self.sequences, self.length_tokens), None
        ids = torch.tensor(subject.encode(data, special=False), dtype=torch.int64)
        ids = ids[: self.length_tokens + (self.sequences - 1) * self.stride_tokens]
        if ids.numel() < 2:
            raise UsageError(f"`{self.data}` has no token to score", why="the first token is never scored")
        return sliding_windows(ids, self.length_tokens, self.stride_tokens)

    def run(self, prepared: tuple[Any, Any], subject: Subject, progress: Progress) -> Mapping[str, Figure]:
        """One figure; its examples are windows: their summed negative log-likelihood and their tokens."""
        from prunekit.evaluate.perplexity import perplexity

        ids, scored = prepared
        found = perplexity(subject.model, ids, self._batch(subject), progress, scored)
        counts = [float(count) for count in found.window_tokens]
        return {"perplexity": Figure.of("exp_mean", found.window_nll, counts, better="lower")}

    def _batch(self, subject: Subject) -> int:
        """Windows are long already: on a CPU several at once gain nothing and hold more memory."""
        return 1 if subject.device == "cpu" else subject.batch_size
