"""Training under FSDP2: each process holds a part of the model, and the first one gets it whole at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import HealError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def wanted() -> bool:
    """Whether accelerate's configuration asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


@contextmanager
def whole() -> Iterator[None]:
    """Models loaded meanwhile are loaded in every process; under FSDP those of the others may be left empty."""
    before = os.environ.get(_EFFICIENT)
    os.environ[_EFFICIENT] = "false"
    try:
        yield
    finally:
        del os.environ[_EFFICIENT]
        if before is not None:
            os.environ[_EFFICIENT] = before


def check(trainer: Any) -> None:
    """Fails for ways of sharding that do not give the whole model back.

    Raises:
        UsageError: for DeepSpeed and the first FSDP.
    """
    hint = "give accelerate a configuration with `fsdp_version: 2`, or use torchrun alone"
    if trainer.is_deepspeed_enabled:
        raise UsageError("healing under DeepSpeed is not possible", hint=hint)
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise UsageError("healing under the first version of FSDP is not possible", hint=hint)


def load(model: Any, state: Mapping[str, Tensor]) -> None:
    """Gives a model the values that training under FSDP ended with.

    Args:
        model: built as the trained one was.
        state: of the first process, on the CPU.
    Raises:
        HealError: if a parameter has no value.
    """
    model.load_state_dict(state, strict=False)
    there = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if name in state}
    lost = next((name for name, p in model.named_parameters() if id(p) not in there), None)
    if lost is not None:
        raise HealError(f"`{lost}` did not come back from FSDP", hint="train without FSDP, by torchrun alone")
