"""What transformers calls the KV cache: `cache` from 5.24 on, `past_key_values` before."""

from __future__ import annotations

import inspect
from typing import Any

_NAMES = ("cache", "past_key_values")


def cache_argument(model: Any) -> str:
    """Name under which a decoder's forward takes its KV cache."""
    taken = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in taken), _NAMES[-1])


def cache_of(output: Any) -> Any:
    """KV cache that a decoder returned, None without one."""
    return next((getattr(output, name) for name in _NAMES if hasattr(output, name)), None)
