"""Greedy continuations of many prompts, in batches padded on the left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from prunekit.core.progress import NULL_PROGRESS, Progress


def greedy_config(model: Any, pad: int | None, new_tokens: int) -> Any:
    """Generation settings that decode greedily, whatever settings come with the model."""
    from transformers import GenerationConfig

    end = model.generation_config.eos_token_id
    first_end = end[0] if isinstance(end, list) else end
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=new_tokens,
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=end,
        pad_token_id=pad if pad is not None else first_end if first_end is not None else 0,
    )


def continuations(
    model: Any,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    batch_size: int = 8,
    progress: Progress = NULL_PROGRESS,
) -> list[list[int]]:
    """What the model writes after each prompt, greedily, in the order given; without end-of-text tokens.

    Args:
        model: causal language model, in eval mode.
        prompts: token ids, none empty; prompts of like length run together, padded on the left.
        new_tokens: most tokens written.
        batch_size: prompts run at once.
        progress: shown as prompts.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    config = greedy_config(model, None, new_tokens)
    end = config.eos_token_id
    ends = set(end if isinstance(end, list) else [] if end is None else [end])
    found: dict[int, list[int]] = {}
    with torch.no_grad(), progress.task("writing", total=len(order), unit="prompts") as task:
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            longest = max(len(prompts[number]) for number in chosen)
            # What stands under a mask of 0 is not seen.
            ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(chosen):
                prompt = prompts[number]
                ids[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            made = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=config
            )
            for number, row_ids in zip(chosen, made[:, longest:].tolist(), strict=True):
                stop = next((place for place, token in enumerate(row_ids) if token in ends), len(row_ids))
                found[number] = row_ids[:stop]
            task.advance(len(chosen))
    return [found[number] for number in range(len(prompts))]
