"""Another attention while a model is trained, and its own again afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prunekit.core.errors import HealError
from prunekit.core.registry import ATTENTIONS

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.core.recipe_heal import Heal

_NAME = "prunekit_heal"


class Switch:
    """Attention of a method in training, dense attention in evaluation and in the last steps.

    Args:
        asked: names the method.
    """

    def __init__(self, asked: Heal) -> None:
        if asked.attention is None:
            raise ValueError("the recipe asks for no other attention")
        self._method = ATTENTIONS.get(asked.attention.method)(**asked.attention.knobs)
        self._first_dense = asked.steps - round(self._method.dense_end * asked.steps)
        self._dense = False

    def at_step(self, step: int) -> None:
        """Says how many steps are done."""
        self._dense = step >= self._first_dense

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """As transformers calls an attention function.

        Raises:
            HealError: under a mask that is more than causality.
        """
        if self._dense or not module.training:
            dense: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
            return dense
        if attention_mask is not None or options.get("is_causal") is False:
            raise HealError(
                "`heal.attention` goes with plain causal attention alone",
                why="a layer of this model has a mask of its own, such as a sliding window",
                hint="take `attention` out, or shorten `heal.length_tokens` to the window",
            )
        found = self._method.attend(query, key, value, options.get("scaling"))
        return found.transpose(1, 2).contiguous(), None


@contextmanager
def attending(model: PreTrainedModel, attention: Callable[..., Any], name: str = _NAME) -> Iterator[None]:
    """Meanwhile a model attends by a function.

    Args:
        model: its attention is its own again afterwards.
        attention: as transformers calls one.
        name: that transformers knows it by; two at a time need two.
    Raises:
        HealError: if the model's attention cannot be changed.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation) for config in configs.values()]
    ALL_ATTENTION_FUNCTIONS[name] = attention
    # Masks are made only for names known to the whole process; this one stays known, and means transformers' own.
    AttentionMaskInterface.register(name, sdpa_mask)
    try:
        model.set_attn_implementation(name)
        if any(config._attn_implementation != name for config, _ in before):
            raise HealError(
                f"`{type(model).__name__}` does not let its attention be changed",
                why="its code calls no attention function of transformers' AttentionInterface",
                hint="take `heal.attention`, or `relations`, out",
            )
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
        del ALL_ATTENTION_FUNCTIONS[name]
