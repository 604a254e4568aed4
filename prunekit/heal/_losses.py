"""Losses of healing.

B: sequences, T: tokens, V: vocabulary, K: most likely tokens kept, D: hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Top:
    """A distribution over the vocabulary by its most likely tokens, the others as one.

    Args:
        log_probs: [B, T, K + 1], the last of them of all other tokens together; -inf where there are none.
        tokens: which tokens, int64 [B, T, K].
    """

    log_probs: Tensor
    tokens: Tensor


def top(logits: Tensor, k: int, temperature: float) -> Top:
    """The `k` most likely tokens under softmax(logits / temperature); all where there are fewer than `k`."""
    log_probs = (logits.float() / temperature).log_softmax(-1)
    best, tokens = log_probs.topk(min(k, logits.shape[-1]), -1)
    return Top(torch.cat([best, _rest(log_probs, tokens)], -1), tokens)


def _rest(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Log of the probability of all tokens but some [B, T, 1]."""
    if tokens.shape[-1] == log_probs.shape[-1]:
        return torch.full_like(log_probs[..., :1], -torch.inf)
    return log_probs.scatter(-1, tokens, -torch.inf).logsumexp(-1, keepdim=True)


def kl(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean over tokens of KL(target || student) at a temperature, times its square so that gradients keep their size.

    Args:
        logits: of the student [B, T, V].
        target: logits of the teacher [B, T, V].
    Source:
        Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531, section 2.
    """
    ours = (logits.float() / temperature).log_softmax(-1)
    theirs = (target.float() / temperature).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean() * temperature**2


def kl_of_top(logits: Tensor, target: Top, temperature: float) -> Tensor:
    """The same where only the teacher's most likely tokens are known: all others count as one token on both sides.

    That is at most the full divergence, and equal to it where K is the whole vocabulary.

    Args:
        logits: of the student [B, T, V].
        target: of the teacher at the same temperature; made to sum to one, which rounding on disk disturbs.
    """
    log_probs = (logits.float() / temperature).log_softmax(-1)
    ours = log_probs.gather(-1, target.tokens)
    theirs = target.log_probs.float().log_softmax(-1)
    if target.tokens.shape[-1] == logits.shape[-1]:
        theirs = theirs[..., :-1]
    else:
        ours = torch.cat([ours, _rest(log_probs, target.tokens)], -1)
    # Nothing is added where the teacher's probability is zero.
    terms = torch.where(theirs.isneginf(), 0.0, theirs.exp() * (theirs - ours))
    return terms.sum(-1).mean() * temperature**2


def next_token(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross entropy of each token given those before it, mean over tokens, in nats.

    Args:
        logits: [B, T, V].
        input_ids: int64 [B, T], no padding.
    """
    return torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), input_ids[:, 1:].flatten())


def hidden_error(ours: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of |ours - theirs|^2 / |theirs|^2, so that no token outweighs another by its norm.

    Args:
        ours: hidden states of the student [B, T, D].
        theirs: of the teacher.
        mask: 1 where a token counts [B, T]; None where all do.
    """
    theirs = theirs.float()
    error = (ours.float() - theirs).square().sum(-1) / theirs.square().sum(-1).clamp_min(1e-12)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()
