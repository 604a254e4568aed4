"""Logits at chosen positions of a batch, made a few at a time so that a large vocabulary takes little memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prunekit.core.errors import EvaluationError

# Float32 logits held at a time: a window of 512 tokens over a 49,152-word vocabulary would take 96 MiB. A GPU holds as
# much as an eighth of its free memory.
_LOGIT_BYTES = 64 * 2**20
# Tokens on which the chunked head is compared with the model's own logits.
_PROBE_TOKENS = 8
# Relative to the largest logit: two orders of the same sums differ by 1e-6 in float32 and 1e-2 in bfloat16.
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class PositionLogits:
    """Gives logits at positions of a batch.

    The head runs on a few positions at a time where that gives the model's own logits; models that do more than apply
    their output embeddings (soft caps, scaling) give whole rows.

    Args:
        model: causal language model, in eval mode.
        probe: int64 [tokens], ids on which both ways are compared; the first few count.
    Raises:
        EvaluationError: for a model without a language-model head.
    """

    def __init__(self, model: Any, probe: Tensor) -> None:
        self.model = model
        self.head = model.get_output_embeddings()
        if self.head is None:
            raise EvaluationError(
                f"`{type(model).__name__}` has no language-model head", hint="measure embeddings instead"
            )
        device = model.device
        self.held = (
            max(_LOGIT_BYTES, torch.cuda.mem_get_info(device)[0] // 8) if device.type == "cuda" else _LOGIT_BYTES
        )
        self.chunked = self._same(probe[None, :_PROBE_TOKENS].to(device))

    def _same(self, probe: Tensor) -> bool:
        base, head = self.model.base_model, self.head
        if base is self.model or not hasattr(head, "weight"):
            return False
        with torch.no_grad():
            expected = self.model(input_ids=probe, use_cache=False).logits.float()
            found = head(base(input_ids=probe, use_cache=False).last_hidden_state).float()
        tolerance = _PROBE_TOLERANCE.get(head.weight.dtype, 2e-2) * float(expected.abs().max())
        return found.shape == expected.shape and float((found - expected).abs().max()) <= tolerance

    def __call__(self, ids: Tensor, wanted: Tensor, mask: Tensor | None = None) -> Iterator[Tensor]:
        """Logits at the wanted positions, in their order (row by row), in pieces [n, vocabulary].

        Args:
            ids: int64 [batch, tokens], padded on the right where `mask` is given.
            wanted: bool [batch, tokens].
            mask: int64 [batch, tokens], 0 where padded; None without padding.
        """
        given = {"input_ids": ids, "use_cache": False} | ({} if mask is None else {"attention_mask": mask})
        if not self.chunked:
            yield self.model(**given).logits[wanted]
            return
        hidden = self.model.base_model(**given).last_hidden_state[wanted]
        rows = max(1, self.held // (4 * self.head.weight.shape[0]))
        for first in range(0, hidden.shape[0], rows):
            yield self.head(hidden[first : first + rows])
