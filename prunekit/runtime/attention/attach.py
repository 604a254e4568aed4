"""Turns a pattern on for one model, and back off."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit.core.errors import RuntimePolicyError, UsageError
from prunekit.runtime.attention.interface import NAME, register, say_plain
from prunekit.runtime.attention.kept import forget
from prunekit.runtime.attention.patterns._engine import Pattern
from prunekit.runtime.attention.patterns._scored import Scored
from prunekit.runtime.attention.policy import model_facts, policy
from prunekit_kernels.block_sparse_prefill import refusal

ABSENT = object()
_COUNTER = itertools.count()


class Attachment:
    """A pattern on a model, until `detach()` or the end of a `with` block puts everything back."""

    def __init__(self, model: PreTrainedModel, section: Mapping[str, Any]) -> None:
        self._model = model
        self._number = next(_COUNTER)
        configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
        self._before = [(c, c._attn_implementation, getattr(c, "prunekit", ABSENT)) for c in configs.values()]
        for config, _, old in self._before:
            kept = dict(old) if isinstance(old, Mapping) else {}
            config.prunekit = {**kept, "runtime": {**kept.get("runtime", {}), "attention": dict(section)}}
        _ATTACHED.add(self)
        try:
            model.set_attn_implementation(NAME)
        except BaseException:
            self.detach()
            raise
        stuck = [type(c).__name__ for c, _, _ in self._before if c._attn_implementation != NAME]
        if stuck:
            self.detach()
            raise RuntimePolicyError(
                f"`{type(model).__name__}` does not let its attention be changed",
                why="its code calls no attention function of transformers' AttentionInterface",
            )

    def detach(self) -> None:
        """Puts the model's attention and config back as they were; a second call does nothing.

        Under a later pattern on the same model that one stays on, and puts back what was before this one.
        """
        _ATTACHED.discard(self)
        later = sorted((a for a in _ATTACHED if a._number > self._number), key=lambda a: a._number)
        for config, implementation, section in self._before:
            if above := next((a for a in later if any(config is c for c, _, _ in a._before)), None):
                mine = config, implementation, section
                above._before = [mine if c is config else (c, i, s) for c, i, s in above._before]
                continue
            config._attn_implementation = implementation
            if section is ABSENT:
                del config.prunekit
            else:
                config.prunekit = section
        self._before = []
        forget(self._model)

    def __enter__(self) -> PreTrainedModel:
        return self._model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


_ATTACHED: weakref.WeakSet[Attachment] = weakref.WeakSet()


def attach(
    model: PreTrainedModel, pattern: Pattern | Scored | str | Mapping[str, Any], *, layers: Sequence[int] | None = None,
    strict: bool = False,
) -> Attachment:  # fmt: skip
    """Lets a model attend sparsely, from now on or within a `with` block.

    Args:
        model: any model whose code uses transformers' AttentionInterface.
        pattern: a pattern, its name, or a config section such as `{"pattern": "power", "block_tokens": 128}`.
        layers: the layers it is for, counted from 0; the others stay dense. None: all.
        strict: raise instead of warning when no GPU kernel serves the model.
    Returns:
        What undoes it: use it in a `with` statement or call its `detach()`.
    Raises:
        UsageError: for an unknown pattern or option, or what is no model of transformers.
        RuntimePolicyError: if the pattern is for another model, if the model's attention cannot be changed, or, if
            strict, if it runs without a kernel.

    Example:
        with attach(model, {"pattern": "power", "block_tokens": 128, "window_blocks": 8}):
            model.generate(**inputs)
    """
    # What torch.compile or peft return is no PreTrainedModel and behaves as the one inside.
    if not hasattr(model, "set_attn_implementation"):
        raise UsageError(f"`{type(model).__name__}` is no model of transformers", hint="attach a pattern to one")
    chosen = policy(pattern, layers)
    chosen.require_for(model_facts(model.config))
    _require_one_stack(model)
    reason = _no_kernel(model)
    if reason and strict:
        raise RuntimePolicyError("no kernel serves this model", why=reason)
    register()
    attachment = Attachment(model, chosen.section())
    if reason:
        say_plain(reason, model.device)
    return attachment


def _require_one_stack(model: PreTrainedModel) -> None:
    """Refuses a model of an encoder and a decoder; either of them alone is none."""
    if getattr(model.config, "is_encoder_decoder", False) and model.get_encoder() is not model:
        raise RuntimePolicyError(
            f"`{type(model).__name__}` has an encoder and a decoder",
            why="one pattern would be for both and for the attention between them, where positions differ",
            hint="run the model without a pattern",
        )


def _no_kernel(model: PreTrainedModel) -> str:
    """Why no kernel serves a model, or an empty string; refuses one without a number of heads for all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise RuntimePolicyError(
            f"`{type(model).__name__}` cannot read by a pattern",
            why="its configuration names no number of attention heads for all layers",
        )
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    like = torch.empty(1, heads, 0, dim, dtype=model.dtype, device=model.device)
    return refusal(like, like)
