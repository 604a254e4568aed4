"""Checks of pattern options."""

from __future__ import annotations

from prunekit.core.errors import UsageError


def at_least(pattern: object, **least: int) -> None:
    """Refuses options of a pattern that are no integers or lie under their least value.

    Raises:
        UsageError: naming the first such option.
    """
    for option, low in least.items():
        value = getattr(pattern, option)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise UsageError(
                f"`{option}: {value}` is no option of pattern {type(pattern).__name__}",
                why=f"it counts tokens or blocks and must be an integer of at least {low}",
            )
