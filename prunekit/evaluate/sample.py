"""A greedy continuation, to read."""

from __future__ import annotations

from typing import Any

import torch

from prunekit.evaluate.generation import greedy_config


def continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 40) -> str:
    """What the model writes after a prompt, greedily and with its KV cache, without the prompt.

    The prompt is plain text: no chat template is applied, and sampling settings that come with the model are ignored.

    Args:
        model: causal language model, in eval mode.
        tokenizer: of the model.
        prompt: text to continue.
        new_tokens: most tokens written; fewer when the model ends its text.
    """
    config = greedy_config(model, tokenizer.pad_token_id, new_tokens)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    with torch.no_grad():
        ids = model.generate(**inputs, generation_config=config)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
