"""A whole model under dense and sparse attention: time to first token, tokens a second, peak memory.

    python benchmarks/attention_model.py --out rows.jsonl [--lengths 32768 131072] [--seconds 170]

Random weights in the shape of Llama-3-8B, bfloat16, made on the device; only the shapes matter to the clock. Prompts
are random tokens, logits are made for the last one: dense (sdpa of transformers) against `power`. Steps write a token
at a time over a cache of random keys and values: dense against `quest`, started one by one as `generate` does without
compiling; beside the wall clock stands the time that kernels ran, so that launching and computing can be told apart.
Prompts under 8 s are run twice; the first may compile and build lists. Before that, a small model of the same kind must
give the same logits under patterns that read everything as with sdpa. Rows are written as they come. `--rehearse` runs
all of it with a tiny model on the CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from prunekit.runtime import attach
from prunekit.runtime.attention.patterns._engine import Pattern
from prunekit.runtime.attention.patterns._scored import Scored
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.quest import Quest

# Llama-3-8B.
SHAPE: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131584,
}  # fmt: skip
TINY: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "max_position_embeddings": 4096,
}  # fmt: skip
STEPS = 16


class Bench:
    """Rows and clock."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.began = options, time.monotonic()
        self.on = "cpu" if options.rehearse else "cuda"
        self.dtype = torch.float32 if options.rehearse else torch.bfloat16
        options.out.write_text("")

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def write(self, **row: Any) -> None:
        with self.options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{self.seconds():4.0f} s", json.dumps(row), flush=True)

    def build(self, shape: dict[str, Any]) -> LlamaForCausalLM:
        """A model with random weights, on the device from the start."""
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.on):
                config = LlamaConfig(**shape, rope_theta=500000.0, attn_implementation="sdpa")
                return LlamaForCausalLM(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def clock(self, run: Callable[[], Any]) -> float:
        """Seconds of a call, until the device is done."""
        if self.on == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.on == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def clear(self) -> None:
        gc.collect()
        if self.on == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 2) if self.on == "cuda" else None

    def check(self) -> bool:
        """Whether a small model gives the same logits under a dense pattern, for a prompt and a step after it."""
        model = self.build({**TINY, "num_attention_heads": 4, "head_dim": 128})
        ids = torch.randint(0, TINY["vocab_size"], (1, 1000), device=self.on)
        found = []
        for pattern in (None, Dense(), Quest(16, 2048)):
            with attach(model, pattern) if pattern else nullcontext():
                cache = DynamicCache()
                first = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                found.append(torch.cat([first, model(ids[:, :1], past_key_values=cache, use_cache=True).logits]))
        error = max(float((other - found[0]).float().norm() / found[0].float().norm()) for other in found[1:])
        limit = 1e-4 if self.on == "cpu" else 2e-2
        self.write(what="check", relative_error=error, limit=limit, passed=error <= limit)
        return error <= limit

    def prompts(self, model: LlamaForCausalLM, length: int) -> None:
        """Time to the first token, dense and under power."""
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=self.on)
        times: dict[str, float] = {}
        power = Power(block_tokens=128, window_blocks=8, sink_blocks=1)
        for name, pattern in (("power", power), ("dense sdpa", None)):
            runs: list[float] = []
            while len(runs) < 2 and sum(runs) < 8:
                self.clear()
                if self.seconds() > self.options.seconds:
                    self.write(what=f"prompt, {name}", length=length, error="no time left")
                    return
                with attach(model, pattern) if pattern else nullcontext():
                    runs.append(self.clock(lambda: self.prompt(model, ids)[0].argmax()))
            times[name] = min(runs)
            self.write(what="prompt", attention=name, length=length, first_token_s=[round(t, 4) for t in runs],
                       tokens_s=round(length / min(runs)), peak_gib=self.peak_gib())  # fmt: skip
        self.write(
            what="prompt, times as fast as dense sdpa", length=length, ratio=times["dense sdpa"] / times["power"]
        )

    def prompt(self, model: LlamaForCausalLM, ids: Tensor) -> tuple[Tensor, DynamicCache]:
        cache = DynamicCache()
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1], cache

    def steps(self, model: LlamaForCausalLM, length: int, batch: int) -> None:
        """Tokens a second over a cache of `length` tokens, dense and under quest."""
        if self.seconds() > self.options.seconds:
            self.write(what="steps", length=length, batch=batch, error="no time left")
            return
        patterns: dict[str, Pattern | Scored | None] = {"dense sdpa": None, "quest": Quest(16, 2048)}
        times = {}
        for name, pattern in patterns.items():
            self.clear()
            cache = self.filled(model, length, batch)
            ids = torch.zeros(batch, 1, dtype=torch.long, device=self.on)

            def step(ids: Tensor = ids, cache: DynamicCache = cache) -> None:
                ids.copy_(model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1))

            with attach(model, pattern) if pattern else nullcontext():
                for _ in range(3):
                    step()
                times[name] = self.clock(lambda step=step: [step() for _ in range(STEPS)]) / STEPS
                busy = self.busy(step)
            self.write(
                what="steps", attention=name, length=length, batch=batch, ms_a_step=round(times[name] * 1e3, 3),
                kernels_ms_a_step=busy, tokens_s=round(batch / times[name], 1), peak_gib=self.peak_gib(),
            )  # fmt: skip
            # The step holds the cache too, which would count against the next pattern.
            del step, cache
        self.write(what="steps, times as fast as dense sdpa", length=length, batch=batch,
                   ratio=times["dense sdpa"] / times["quest"])  # fmt: skip

    def busy(self, step: Callable[[], None]) -> float | None:
        """Milliseconds that kernels ran in a step, by the profiler."""
        if self.on == "cpu":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for _ in range(2):
                step()
            torch.cuda.synchronize()
        return round(sum(e.self_device_time_total for e in seen.key_averages()) / 2e3, 3)

    def filled(self, model: LlamaForCausalLM, length: int, batch: int) -> DynamicCache:
        """A cache of random keys and values, which steps cannot tell from a prompt's."""
        config, cache = model.config, DynamicCache()
        shape = (batch, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, device=self.on, dtype=self.dtype) for _ in "kv"), layer)
        return cache

    def run(self) -> int:
        with torch.no_grad():
            about: dict[str, str] = {"torch": torch.__version__}
            if self.on == "cuda":
                from attention_decode import facts

                about = facts(self.options.commit)
            self.write(what="facts", transformers=transformers.__version__, **about)
            if not self.check():
                return 1
            model = self.build(TINY if self.options.rehearse else SHAPE)
            self.write(what="built", parameters=sum(p.numel() for p in model.parameters()))
            first, *longer = self.options.lengths
            self.prompts(model, first)
            for length, batch in [(n, 1) for n in longer] + [(first, 4)]:
                self.steps(model, length, batch)
            for length in longer:
                self.prompts(model, length)
        self.write(what="done", seconds=round(self.seconds()))
        return 0


def main() -> int:
    """Checks and times; 1 if the check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072], help="tokens of a prompt or cache")
    parser.add_argument("--seconds", type=float, default=170, help="nothing new is begun after so many")
    parser.add_argument("--commit", default="", help="what the rows call the code; asked of git if not given")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU, times mean nothing")
    options = parser.parse_args()
    if options.rehearse:
        options.lengths = [512, 3000]
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; `--rehearse` runs without one")
    return Bench(options).run()


if __name__ == "__main__":
    sys.exit(main())
