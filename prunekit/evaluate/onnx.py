"""Perplexity and speed of an exported decoder in ONNX Runtime."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.evaluate.latency import LatencyResult, latency_result
from prunekit.evaluate.perplexity import PerplexityResult, require_windows, summed

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.export.ort import OrtDecoder


def onnx_perplexity(
    decoder: OrtDecoder, ids: Tensor, progress: Progress = NULL_PROGRESS, scored: Tensor | None = None
) -> PerplexityResult:
    """Perplexity of an exported decoder; arguments and result as `perplexity`, one window at a time."""
    require_windows(ids)
    windows, length = ids.shape
    counts = [length - 1] * windows if scored is None else [int(count) for count in scored]
    sums: list[float] = []
    with progress.task("perplexity", total=windows, unit="windows") as task:
        for window, count in zip(ids.numpy(), counts, strict=True):
            row = window[None].astype(np.int64)
            logits = decoder.step(row, np.ones_like(row), decoder.empty_cache(1))[0, length - 1 - count : length - 1]
            target = window[length - count :]
            largest = logits.max(axis=-1)
            spread = np.log(np.exp(logits - largest[:, None]).sum(axis=-1)) + largest
            sums.append(float((spread - logits[np.arange(count), target]).astype(np.float64).sum()))
            task.advance(1)
    return summed(sums, counts)


def onnx_latency(
    decoder: OrtDecoder,
    vocabulary: int,
    batch: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Progress = NULL_PROGRESS,
) -> LatencyResult:
    """Speed of an exported decoder; as `measure_latency`, on the session's own threads.

    Args:
        decoder: an exported decoder.
        vocabulary: random tokens are drawn below it.
        batch: sequences at once.
        prompt_tokens: tokens read in each sequence.
        new_tokens: tokens written in each sequence.
        repeats: measurements, at least 1; one that does not count comes first.
        progress: shown as repeats.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary, (batch, prompt_tokens), dtype=np.int64)
    prefill_s: list[float] = []
    steps_s: list[list[float]] = []
    with progress.task("latency", total=repeats + 1, unit="repeats") as task:
        for repeat in range(repeats + 1):
            cache, mask = decoder.empty_cache(batch), np.ones_like(ids)
            start = time.perf_counter()
            token = decoder.step(ids, mask, cache)[:, -1:].argmax(-1)
            read_s, took = time.perf_counter() - start, []
            for _ in range(new_tokens):
                mask = np.concatenate([mask, np.ones((batch, 1), np.int64)], axis=1)
                start = time.perf_counter()
                token = decoder.step(token, mask, cache)[:, -1:].argmax(-1)
                took.append(time.perf_counter() - start)
            if repeat:
                prefill_s.append(read_s)
                steps_s.append(took)
            task.advance(1)
    return latency_result(prefill_s, steps_s, batch, prompt_tokens, new_tokens, decoder.device, "float32")
