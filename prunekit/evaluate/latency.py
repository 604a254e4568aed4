"""Speed: tokens a second while a model reads its prompt and while it writes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.modeling.kv_cache import cache_argument, cache_of


@dataclass(frozen=True)
class LatencyResult:
    """Speed of a model; figures without a percentile in their name are medians over the repeats.

    Args:
        prefill_tokens_s: prompt tokens read a second, all sequences together.
        decode_tokens_s: tokens written a second, all sequences together, after the prompt; None for encoders.
        prefill_ms: reading the whole prompt, or one forward pass of an encoder.
        prefill_p95_ms: the same, 95th percentile of the repeats.
        decode_ms: one step of writing, a token in each sequence, as the mean over a repeat's steps; None for encoders.
        decode_p50_ms: median over all steps of all repeats; None for encoders.
        decode_p95_ms: their 95th percentile; None for encoders.
        batch: sequences.
        prompt_tokens: tokens read in each sequence.
        new_tokens: tokens written in each sequence; 0 for encoders.
        repeats: measurements.
        device: where it ran.
        dtype: type of the weights.
        threads: torch's threads on the CPU.
    """

    prefill_tokens_s: float
    decode_tokens_s: float | None
    prefill_ms: float
    prefill_p95_ms: float
    decode_ms: float | None
    decode_p50_ms: float | None
    decode_p95_ms: float | None
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    device: str
    dtype: str
    threads: int


def measure_latency(
    model: Any,
    batch: int = 1,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 3,
    progress: Progress = NULL_PROGRESS,
) -> LatencyResult:
    """Reads random tokens and writes greedily with a KV cache; one run that does not count comes first.

    Args:
        model: in eval mode, or an ONNX graph that is called as one. One without a language-model head only reads; a
            vision model reads random images, each of which counts as the patches it makes.
        batch: sequences at once.
        prompt_tokens: tokens read in each sequence; not used for vision models.
        new_tokens: tokens written in each sequence.
        repeats: measurements, at least 1.
        progress: shown as repeats.
    """
    read_once, read, writes = one_pass(model, batch, prompt_tokens)
    wait = _synchronizer(model.device)
    prefill_s: list[float] = []
    steps_s: list[list[float]] = []
    with torch.no_grad(), progress.task("latency", total=repeats + 1, unit="repeats") as task:
        for repeat in range(repeats + 1):
            output, read_s = read_once()
            took = _decode(model, output, new_tokens, wait) if writes else []
            if repeat:
                prefill_s.append(read_s)
                steps_s.append(took)
            task.advance(1)
    dtype = str(model.dtype).removeprefix("torch.")
    device = getattr(model, "ran_on", str(model.device))
    return _result(prefill_s, steps_s, batch, read, new_tokens if writes else 0, device, dtype)


def one_pass(model: Any, batch: int, tokens: int) -> tuple[Callable[[], tuple[Any, float]], int, bool]:
    """A model's reading of random tokens or images, to be timed as often as one likes.

    Args:
        model: in eval mode.
        batch: sequences.
        tokens: in each; images have their own.
    Returns:
        A function that runs the pass and gives its output and seconds; the tokens each sequence stands for; and whether
        the model writes after them.
    """
    inputs, read = _inputs(model, batch, tokens)
    writes = "input_ids" in inputs and bool(model.can_generate())
    wait = _synchronizer(model.device)

    def run() -> tuple[Any, float]:
        wait()
        start = time.perf_counter()
        output = model(**inputs, use_cache=True, logits_to_keep=1) if writes else model(**inputs)
        wait()
        return output, time.perf_counter() - start

    return run, read, writes


def _result(
    prefill_s: list[float],
    steps_s: list[list[float]],
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    device: str,
    dtype: str,
) -> LatencyResult:
    """Medians and percentiles of measured times.

    Args:
        prefill_s: of each repeat, in seconds.
        steps_s: of each repeat, the seconds of every step; empty lists for encoders.
        batch: sequences at once.
        prompt_tokens: tokens read in each sequence.
        new_tokens: tokens written in each sequence.
        device: where it ran.
        dtype: type of the weights.
    """
    prefill = statistics.median(prefill_s)
    steps = [step for took in steps_s for step in took]
    decode = statistics.median(statistics.fmean(took) for took in steps_s) if steps else None
    return LatencyResult(
        prefill_tokens_s=batch * prompt_tokens / prefill,
        decode_tokens_s=batch / decode if decode is not None else None,
        prefill_ms=1e3 * prefill,
        prefill_p95_ms=1e3 * float(np.percentile(prefill_s, 95)),
        decode_ms=1e3 * decode if decode is not None else None,
        decode_p50_ms=1e3 * statistics.median(steps) if steps else None,
        decode_p95_ms=1e3 * float(np.percentile(steps, 95)) if steps else None,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        repeats=len(prefill_s),
        device=device,
        dtype=dtype,
        threads=torch.get_num_threads(),
    )


def _decode(model: Any, output: Any, new_tokens: int, wait: Callable[[], None]) -> list[float]:
    """Seconds of each of `new_tokens` steps."""
    cache = {cache_argument(model): cache_of(output)}
    token = output.logits[:, -1:].argmax(dim=-1)
    wait()
    took = []
    for _ in range(new_tokens):
        start = time.perf_counter()
        output = model(input_ids=token, use_cache=True, **cache)
        token = output.logits[:, -1:].argmax(dim=-1)
        wait()
        took.append(time.perf_counter() - start)
    return took


def _inputs(model: Any, batch: int, prompt_tokens: int) -> tuple[dict[str, Tensor], int]:
    """Random inputs, and the tokens that each sequence stands for."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
        frames = getattr(config, "num_frames", None)
        shape = (config.num_channels, size, size) if frames is None else (frames, config.num_channels, size, size)
        pixels = torch.randn(batch, *shape, generator=generator).to(model.device, model.dtype)
        return {"pixel_values": pixels}, (size // patch) ** 2 * (frames or 1) // getattr(config, "tubelet_size", 1)
    ids = torch.randint(0, config.get_text_config().vocab_size, (batch, prompt_tokens), generator=generator)
    return {"input_ids": ids.to(model.device)}, prompt_tokens


def _synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that returns when all work on the device is done."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    if device.type == "mps":
        return torch.mps.synchronize
    return lambda: None
