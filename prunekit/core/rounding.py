"""How fractions become counts: one rule for all methods."""

from __future__ import annotations

import math

from prunekit.core.errors import PlanError

# Takes the noise of 0.1 * 30 == 3.0000000000000004 away before rounding up.
_NOISE = 1e-9


def n_remove(width: int, remove: float) -> int:
    """Units that go when at least a fraction must: 3 of 30 for 0.1, 13 of 60 for 0.21."""
    return math.ceil(width * remove - _NOISE)


def n_keep(width: int, remove: float, multiple_of: int = 1, min_keep: int = 1) -> int:
    """Units left after removing at least a fraction, rounded down to a multiple.

    Args:
        width: units there are.
        remove: fraction removed, 0 <= remove < 1.
        multiple_of: what the count left must be a multiple of; all units may stay though, whatever their number.
        min_keep: units that stay at least.
    Returns:
        n_keep(11008, 0.25, 64) = 8256.
    Raises:
        PlanError: if no multiple from `min_keep` on is small enough.
    """
    return rounded_keep(width, width - n_remove(width, remove), multiple_of, min_keep)


def rounded_keep(width: int, most: int, multiple_of: int = 1, min_keep: int = 1) -> int:
    """The largest multiple up to `most`, or all of `width` where nothing has to go.

    Raises:
        PlanError: if no multiple from `min_keep` on is small enough.
    """
    if most >= width:
        return width
    keep = most - most % multiple_of
    if keep < max(1, min_keep):
        raise PlanError(
            f"{most} of {width} units would stay, which is too few",
            why=f"at least {max(1, min_keep)} stay, in multiples of {multiple_of}",
            hint="remove less, or lower `multiple_of` or `min_keep`",
        )
    return keep
