"""A greedy continuation, to read."""

from __future__ import annotations

from typing import Any

import torch


def continuation(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 40) -> str:
    """What the model writes after a prompt, greedily and with its KV cache, without the prompt.

    The prompt is plain text: no chat template is applied, and sampling settings that come with the model are ignored.

    Args:
        model: causal language model, in eval mode.
        tokenizer: of the model.
        prompt: text to continue.
        new_tokens: most tokens written; fewer when the model ends its text.
    """
    from transformers import GenerationConfig

    end = model.generation_config.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else first_end
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=end,
        pad_token_id=pad,
    )
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    with torch.no_grad():
        ids = model.generate(**inputs, generation_config=config)
    return str(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
