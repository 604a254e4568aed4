"""A whole model under dense and sparse attention: time to first token, tokens a second, peak memory.

    python benchmarks/attention_model.py --out rows.jsonl [--lengths 32768 131072] [--seconds 170] [--compiled]

Random weights in the shape of Llama-3-8B, bfloat16, made on the device; only the shapes matter to the clock. Prompts
are random tokens, logits are made for the last one: dense (sdpa of transformers) against `power`. Steps write a token
at a time over a cache of random keys and values, in two ways:

- eager, started one by one over a dynamic cache, as `generate` does without compiling;
- captured, one CUDA graph of a step over a static cache with as many slots, the last 64 of them free at the start. Here
  dense is run in three ways: sdpa of transformers, whose mask makes it repeat keys and values for each query head; the
  pattern `dense` of this project, one kernel over what is filled; sdpa over all slots without a mask, which is wrong by
  the slots that are not filled and stands for the fastest that torch has.

`--compiled` adds steps under `torch.compile(mode="reduce-overhead")`, as `generate(cache_implementation="static")` runs
them, which takes minutes. Beside the wall clock stands the time that kernels ran, so that launching and computing
can be told apart. Prompts under 8 s are run twice; the first may compile and build lists. Before that, a small model of
the same kind must give the same logits under patterns that read everything as with sdpa, and captured steps the same as
eager ones. Rows are written as they come. `--rehearse` runs all of it with a tiny model on the CPU, where nothing is
captured.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

import torch
import transformers
from record import append
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from prunekit.runtime import attach
from prunekit.runtime.attention.kept import forget
from prunekit.runtime.attention.patterns._engine import Pattern
from prunekit.runtime.attention.patterns._scored import Scored
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.quest import Quest
from prunekit_kernels.block_sparse_prefill import cases

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
FREE = 64
ALL_SLOTS = "sdpa_all_slots"
POWER = Power(block_tokens=128, window_blocks=8, sink_blocks=1)
# Most telling first: time may run out.
EAGER: dict[str, Pattern | Scored | str | None] = {"quest": Quest(16, 2048), "dense sdpa": None}
CAPTURED: dict[str, Pattern | Scored | str | None] = {
    "quest": Quest(16, 2048), "dense pattern": Dense(), "dense sdpa": None, "dense sdpa, no mask, all slots": ALL_SLOTS,
    "power": POWER,
}  # fmt: skip


def all_slots(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one token to every slot of a cache, filled or not."""
    out = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ALL_SLOTS, all_slots)
AttentionMaskInterface.register(ALL_SLOTS, lambda **options: None)


class Under:
    """A model under an attention of transformers, named, until the end of a `with` block."""

    def __init__(self, model: LlamaForCausalLM, name: str) -> None:
        self.model, self.name, self.before = model, name, model.config._attn_implementation

    def __enter__(self) -> None:
        self.model.set_attn_implementation(self.name)

    def __exit__(self, *error: object) -> None:
        self.model.set_attn_implementation(self.before)


def under(model: LlamaForCausalLM, how: Pattern | Scored | str | None) -> AbstractContextManager[Any]:
    """The model under a pattern, an attention of transformers by name, or as it is."""
    if how is None:
        return nullcontext()
    return Under(model, how) if isinstance(how, str) else attach(model, how)


class Step:
    """One step: reads a token of each sequence; if greedy, writes the next one in its place."""

    def __init__(self, model: LlamaForCausalLM, cache: Cache, batch: int, on: str, greedy: bool = True) -> None:
        self.model, self.cache, self.greedy = model, cache, greedy
        self.forward: Callable[..., Any] = model.forward
        self.ids = torch.zeros(batch, 1, dtype=torch.long, device=on)
        self.logits = torch.zeros(batch, 1, model.config.vocab_size, device=on, dtype=model.dtype)

    def __call__(self) -> None:
        self.logits.copy_(self.forward(self.ids, past_key_values=self.cache, use_cache=True).logits)
        if self.greedy:
            self.ids.copy_(self.logits.argmax(-1))

    def written(self) -> int:
        """Tokens that the cache holds."""
        return int(self.cache.get_seq_length())


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
        append(self.options.out, row)
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
        """Whether a small model gives the logits that it must.

        Those of sdpa under patterns that read everything, for a prompt and a step after it; those of eager steps over a
        dynamic cache in captured ones over a static cache.
        """
        model = self.build({**TINY, "num_attention_heads": 4, "head_dim": 128})
        ids = torch.randint(0, TINY["vocab_size"], (1, 1000), device=self.on)
        found = []
        for pattern in (None, Dense(), Quest(16, 2048)):
            with attach(model, pattern) if pattern else nullcontext():
                cache = DynamicCache()
                first = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                found.append(torch.cat([first, model(ids[:, :1], past_key_values=cache, use_cache=True).logits]))
        errors = [cases.relative_error(other, found[0]) for other in found[1:]]
        for how in (Quest(16, 128), POWER, Dense()):
            with under(model, how):
                found = []
                for cache in (DynamicCache(), StaticCache(model.config, max_cache_len=1024)):
                    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    step = Step(model, cache, 1, self.on, greedy=False)
                    run = step if isinstance(cache, DynamicCache) else self.captured(step)
                    while step.written() < 1008:
                        run()
                    found.append(step.logits)
                errors.append(cases.relative_error(found[1], found[0]))
        limit = 1e-4 if self.on == "cpu" else 2e-2
        self.write(what="check", relative_errors=errors, limit=limit, passed=max(errors) <= limit)
        return max(errors) <= limit

    def prompts(self, model: LlamaForCausalLM, length: int) -> None:
        """Time to the first token, dense and under power."""
        ids = torch.randint(0, model.config.vocab_size, (1, length), device=self.on)
        times: dict[str, float] = {}
        for name, pattern in (("power", POWER), ("dense sdpa", None)):
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

    def steps(self, model: LlamaForCausalLM, length: int, batch: int, way: str) -> None:
        """Tokens a second over a cache of `length` tokens."""
        times: dict[str, float] = {}
        for name, how in (EAGER if way == "eager" else CAPTURED).items():
            about = {"what": f"steps, {way}", "attention": name, "length": length, "batch": batch}
            if way == "compiled" and isinstance(how, str):
                continue
            if self.seconds() > self.options.seconds:
                self.write(**about, error="no time left")
                continue
            self.clear()
            # Bounds of a cache that is gone.
            forget(model)
            try:
                row = self.row(model, length, batch, way, how)
            except RuntimeError as error:
                # What cannot be captured or compiled must not cost the other rows.
                self.write(**about, error=str(error)[:500])
                continue
            times[name] = row["ms_a_step"]
            self.write(**about, **row)
        for name in times:
            if name != "quest" and "quest" in times:
                self.write(what=f"steps, {way}, quest: times as fast as {name}", length=length, batch=batch,
                           ratio=times[name] / times["quest"])  # fmt: skip

    def row(
        self, model: LlamaForCausalLM, length: int, batch: int, way: str, how: Pattern | Scored | str | None
    ) -> dict[str, Any]:
        """Times of one way to run a step; its cache and graph are gone when it returns."""
        cache: Cache = DynamicCache() if way == "eager" else StaticCache(model.config, max_cache_len=length)
        self.fill(cache, model, length if way == "eager" else length - FREE, batch)
        began = self.seconds()
        with under(model, how):
            step = Step(model, cache, batch, self.on)
            run = {"eager": self.warm, "captured": self.captured, "compiled": self.compiled}[way](step)
            ready = self.seconds() - began
            taken = self.clock(lambda: [run() for _ in range(STEPS)]) / STEPS
            busy = self.busy(run)
        return {
            "ms_a_step": round(taken * 1e3, 3), "kernels_ms_a_step": busy, "tokens_s": round(batch / taken, 1),
            "ready_s": round(ready, 1), "peak_gib": self.peak_gib(),
        }  # fmt: skip

    def warm(self, step: Step) -> Callable[[], None]:
        """The step itself, after what its first calls compile."""
        for _ in range(3):
            step()
        return step

    def captured(self, step: Step) -> Callable[[], None]:
        """A step as a CUDA graph; three steps are run before."""
        if self.on == "cpu":
            return self.warm(step)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.warm(step)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def compiled(self, step: Step) -> Callable[[], None]:
        """A step through `torch.compile`, after what its first calls compile and record."""
        torch._dynamo.reset()
        # Room for page bounds is found outside of what is compiled, where a prompt would have found it.
        step()
        mode = {"backend": "aot_eager"} if self.on == "cpu" else {"mode": "reduce-overhead"}
        step.forward = torch.compile(step.model.forward, fullgraph=True, **mode)
        return self.warm(step)

    def busy(self, step: Callable[[], None]) -> float | None:
        """Milliseconds that kernels ran in a step, by the profiler."""
        if self.on == "cpu":
            return None
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            for _ in range(2):
                step()
            torch.cuda.synchronize()
        return round(sum(e.self_device_time_total for e in seen.key_averages()) / 2e3, 3)

    def fill(self, cache: Cache, model: LlamaForCausalLM, length: int, batch: int) -> None:
        """Random keys and values, which steps cannot tell from a prompt's."""
        config = model.config
        shape = (batch, config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads)
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, device=self.on, dtype=self.dtype) for _ in "kv"), layer)

    def run(self) -> int:
        with torch.no_grad():
            about: dict[str, str] = {"torch": torch.__version__}
            if self.on == "cuda":
                from attention_device import facts

                about = facts(self.options.commit)
            self.write(what="facts", transformers=transformers.__version__, **about)
            if not self.check():
                return 1
            model = self.build(TINY if self.options.rehearse else SHAPE)
            self.write(what="built", parameters=sum(p.numel() for p in model.parameters()))
            first, *longer = self.options.lengths
            for way in ("captured", "eager"):
                for length, batch in [(n, 1) for n in longer] + [(first, 4)]:
                    self.steps(model, length, batch, way)
            for length in self.options.lengths:
                self.prompts(model, length)
            if self.options.compiled:
                self.steps(model, self.options.lengths[-1], 1, "compiled")
        self.write(what="done", seconds=round(self.seconds()))
        return 0


def main() -> int:
    """Checks and times; 1 if the check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines are written here")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32768, 131072], help="tokens of a prompt or cache")
    parser.add_argument("--seconds", type=float, default=170, help="nothing new is begun after so many")
    parser.add_argument("--commit", default="", help="what the rows call the code; asked of git if not given")
    parser.add_argument("--compiled", action="store_true", help="add steps through torch.compile, which take minutes")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model on the CPU, times mean nothing")
    options = parser.parse_args()
    if options.rehearse:
        options.lengths = [512, 3008]
    elif not torch.cuda.is_available():
        parser.error("no CUDA device; `--rehearse` runs without one")
    return Bench(options).run()


if __name__ == "__main__":
    sys.exit(main())
