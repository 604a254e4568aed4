"""SinkLoRA's sink-fixed attention: groups, some heads with shifted ones, and sinks that every token reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from prunekit.heal.attentions._grouped import Groups


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ShiftedSparse:
    """Trains with attention inside groups of tokens; the trained model attends to everything as before.

    Three quarters of the heads read the tokens before them in their group. The last quarter does the same with groups
    that are shifted by half their length, so that what groups know passes on; the last of these wraps around. Every
    token also reads the first `sinks` tokens. A token never reads a later one.

    Args:
        groups: into so many the sequence is split; `length_tokens` must be a multiple of twice that.
        sinks: tokens at the start that every token reads.
    """

    groups: int = Field(default=4, ge=2)
    sinks: int = Field(default=4, ge=0)

    dense_end: ClassVar[float] = 0.0
    needs: ClassVar[tuple[str, ...]] = ("text",)
    paper: ClassVar[str] = (
        "SinkLoRA: Enhanced Efficiency and Chat Capabilities for Long-Context Large Language Models, "
        "https://arxiv.org/abs/2406.05678"
    )
    evidence: ClassVar[str] = (
        "text: groups of a quarter, heads halved and the second half halved again, shift, four sinks; the released "
        "code holds LongLoRA's attention alone"
    )
    deviations: ClassVar[str] = (
        "which tokens of the wrapped group read which is not told: here positions decide, so that none reads a later "
        "one; with full weights or adapters, as `heal.train` says"
    )
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {"groups": 4}

    def check(self, length_tokens: int) -> None:
        """Fails for sequences that cannot be split.

        Raises:
            UsageError: naming the lengths that can.
        """
        if length_tokens % (2 * self.groups):
            raise UsageError(
                f"sequences of {length_tokens} tokens make no {self.groups} groups that can be shifted by half",
                hint=f"set `heal.length_tokens` to a multiple of {2 * self.groups}",
            )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """Attention [B, H, T, D] of a causal model; `key` and `value` may have fewer heads."""
        import torch

        from prunekit.heal.attentions._grouped import attend

        heads = query.shape[1]
        key, value = (states.repeat_interleave(heads // states.shape[1], 1) for states in (key, value))
        n = heads - self.shifted_heads(heads)
        parts = [
            attend(query[:, of], key[:, of], value[:, of], self.layout(query.shape[2], shifted, query.device), scaling)
            for of, shifted in ((slice(n), False), (slice(n, heads), True))
            if of.start != heads and of.stop != 0
        ]
        return torch.cat(parts, 1)

    @staticmethod
    def shifted_heads(heads: int) -> int:
        """How many of the heads, the last, have shifted groups."""
        return max(1, heads // 4)

    def layout(self, tokens: int, shifted: bool, device: torch.device) -> Groups:
        """Groups of the one kind of heads or the other."""
        import torch

        from prunekit.heal.attentions._grouped import Groups

        size, at = tokens // self.groups, torch.arange(tokens, device=device)
        order = (at + size // 2) % tokens if shifted else at
        return Groups(order, torch.zeros_like(at), at[: self.sinks], size)
