"""Heterogeneous models made by hand from tiny stock ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tests.tiny import EXPERTS, built_in


def heterogeneous(stock: Any, layers: Mapping[str, Any], state: Mapping[str, Tensor] | None = None) -> Any:
    """Heterogeneous model of a stock model's family, float64, in eval mode.

    Args:
        stock: gives the configuration.
        layers: what its blocks lack, as in `prunekit.per_layer_config`.
        state: tensors, those of removed sub-layers are left out; random ones without it.
    """
    from prunekit.modeling import modeling_prunekit
    from prunekit.modeling.families import hetero_config_fields

    config = stock.config
    fields = hetero_config_fields(config.model_type, [type(stock).__name__])
    cls = getattr(modeling_prunekit, fields["architectures"][0])
    section = {"schema": 1, "base_model_type": config.model_type, "per_layer_config": dict(layers)}
    with built_in(torch.float64):
        model = cls(cls.config_class(**{**config.to_dict(), **fields, "prunekit": section})).eval()
    if config.model_type in EXPERTS:
        model.set_experts_implementation("eager")
    if state is None:
        return model
    names = set(model.state_dict())
    model.load_state_dict({name: tensor for name, tensor in state.items() if name in names})
    return model


def without(stock: Any, *skips: tuple[int, str]) -> Any:
    """Heterogeneous model with a stock model's weights and without some sub-layers, such as `(0, "attention")`."""
    layers: dict[str, Any] = {}
    for block, name in skips:
        layers.setdefault(f"{block:02d}", {"skip": []})["skip"].append(name)
    return heterogeneous(stock, layers, stock.state_dict())
