"""Runs models in llama.cpp and in onnxruntime-genai, and in torch beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from prunekit.modeling.load import load_model

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in 1999, there were  12 small dogs who",
    "def add(a, b):\n    return",
    "Ärger über 3.5 % – it's «naïve», isn't it?\n\n\n1. ½",
)


def torch_run(folder: Path, new_tokens: int) -> list[tuple[list[int], np.ndarray, list[int]]]:
    """For each prompt its ids, logits [length, vocabulary] and greedy continuation, in float32."""
    # Not by AutoTokenizer, which splits text as the model type usually does, whatever tokenizer.json says.
    model, tokenizer = load_model(folder).float(), Tokenizer.from_file(str(folder / "tokenizer.json"))
    model.generation_config.eos_token_id = None
    found = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt).ids
        batch = torch.tensor([ids])
        with torch.no_grad():
            logits = model(batch).logits[0].numpy()
        made = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
        )
        found.append((ids, logits, made[0, len(ids) :].tolist()))
    return found


class LlamaCpp:
    """A GGUF file in llama.cpp, with a float32 KV cache."""

    def __init__(self, file: Path) -> None:
        import llama_cpp

        options: dict[str, Any] = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
        self.llama = llama_cpp.Llama(
            str(file), n_ctx=128, n_batch=128, n_threads=1, logits_all=True, verbose=False, **options
        )

    def ids(self, text: str) -> list[int]:
        """Tokens of a text, special ones put round it as the file says."""
        return list(self.llama.tokenize(text.encode(), add_bos=True, special=True))

    def run(self, ids: list[int], new_tokens: int) -> tuple[np.ndarray, list[int]]:
        """Logits [length, vocabulary] and the greedy continuation."""
        self.llama.reset()
        self.llama.eval(ids)
        logits, made = np.array(self.llama.scores[: len(ids)]), []
        for _ in range(new_tokens):
            made.append(int(np.argmax(self.llama.scores[self.llama.n_tokens - 1])))
            self.llama.eval(made[-1:])
        return logits, made


def genai_run(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy continuations by onnxruntime-genai."""
    import onnxruntime_genai as genai

    model, found = genai.Model(str(folder)), []
    for ids in prompts:
        options = genai.GeneratorParams(model)
        options.set_search_options(max_length=len(ids) + new_tokens, min_length=len(ids) + new_tokens, do_sample=False)
        generator, made = genai.Generator(model, options), []
        generator.append_tokens(ids)
        while not generator.is_done():
            generator.generate_next_token()
            made.append(int(generator.get_next_tokens()[0]))
        found.append(made)
    return found
