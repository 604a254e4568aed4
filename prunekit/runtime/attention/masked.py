"""A pattern as a dense mask on plain attention: what a graph can hold, and the reference for what it computes.

Everything is operations on tensors that follow batch and lengths, so that one trace serves all of them.

Shapes: B batch, H query heads, G key-value heads, Q queries, T keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from prunekit.core.errors import RuntimePolicyError
from prunekit.runtime.attention.patterns._engine import Pattern, order_of
from prunekit.runtime.attention.patterns._scored import is_scored
from prunekit.runtime.attention.policy import name_of, policy_of, refuse_additions, section_of

NAME = "prunekit_masked"


def mask_by_pattern(model: PreTrainedModel) -> bool:
    """Puts a loaded model under the pattern in its configuration, as a dense mask.

    Returns:
        Whether it has a pattern; without one the model stays as it is.
    Raises:
        RuntimePolicyError: for a pattern that chooses by score, or one that is not for this model.
    """
    if section_of(getattr(model.config, "prunekit", None)) is None:
        return False
    pattern = policy_of(model.config).pattern
    if is_scored(pattern):
        raise RuntimePolicyError(
            f"the pattern `{name_of(pattern)}` has no mask",
            why="it chooses keys by score at every call, and a graph holds one mask for all",
            hint="take `runtime` out of the `prunekit` section of `config.json`, or choose a pattern by position",
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return True


def _mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **options: Any,
) -> Tensor | None:  # fmt: skip
    """The model's own mask, bool [B, 1, Q, T], never left out.

    Raises:
        RuntimePolicyError: for a mask that is more than causality and padding, which hides where a text begins.
    """
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise RuntimePolicyError(
            "a pattern on a model whose mask is more than causality and padding cannot be one graph",
            why="the mask of a sliding window does not tell where a padded text begins",
            hint="leave the pattern or the format out",
        )
    options = {**options, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **options,
    )  # fmt: skip
    return mask


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Scaled dot-product attention under the mask of `_mask` and, in the layers that it is for, of the pattern."""
    policy = policy_of(module.config)
    refuse_additions(options)
    if policy.covers(getattr(module, "layer_idx", None)) and not is_scored(policy.pattern):
        attention_mask = _both(policy.pattern, attention_mask, query.shape[2], key.shape[2], query.device)
    out: Tensor = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )[0]
    return out, None


def _both(pattern: Pattern, given: Tensor | None, n_queries: int, n_keys: int, device: torch.device) -> Tensor:
    """Bool [B or 1, 1, Q, T]: the keys that the pattern and the model's mask show.

    Positions count from the first token of each row. Queries end where keys end. A query of padding reads itself.
    """
    order_of(pattern, n_keys)
    k = torch.arange(n_keys, device=device)[None, None, :]
    q = torch.arange(n_queries, device=device)[None, :, None] + (n_keys - n_queries)
    if given is None:
        return pattern.allows(q, k)[:, None]
    # The newest query of a row sees all of its tokens; the first that it sees is the text's first.
    first = given[:, 0, -1:, :].to(torch.int32).argmax(-1, keepdim=True)
    seen = given & pattern.allows(q - first, k - first)[:, None]
    return seen | ((k == q)[:, None] & ~seen.any(-1, keepdim=True))
