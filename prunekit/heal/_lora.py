"""Adapters of low rank by peft, merged into the weights when training is over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prunekit.core.errors import HealError

if TYPE_CHECKING:
    from prunekit.core.recipe_heal import Heal


def require_peft() -> None:
    """Fails where peft is not installed.

    Raises:
        HealError: with the command that installs it.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise HealError(
            "`heal.train: lora` needs the package peft", why=str(error), hint="pip install 'prunekit[heal]'"
        ) from error


def adapted(model: Any, asked: Heal) -> Any:
    """The model with an adapter at every linear layer of its blocks; only those are trained.

    Args:
        model: changed in place.
        asked: rank and scale; the draw of the adapters follows its seed.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    from prunekit.modeling.modeling_prunekit import blocks_of

    blocks = blocks_of(model)
    place = next(name for name, module in model.named_modules() if module is blocks)
    layers = [n for n, m in blocks.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    conv = any(isinstance(blocks.get_submodule(name), Conv1D) for name in layers)
    config = LoraConfig(
        r=asked.lora_rank,
        lora_alpha=asked.lora_alpha,
        lora_dropout=0.0,
        target_modules=[f"{place}.{name}" for name in layers],
        fan_in_fan_out=conv,
    )
    with torch.random.fork_rng():
        torch.manual_seed(asked.seed)
        return get_peft_model(model, config)


def merged(model: Any) -> Any:
    """The model that was adapted, with the adapters in its weights."""
    return model.merge_and_unload()
