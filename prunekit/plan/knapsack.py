"""Choosing one option of every item so that costs fit a limit and the least is lost (multiple-choice knapsack)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from prunekit.core.errors import PlanError

# Choices held at a time. Layers of a few shapes make far fewer; beyond it, of choices whose costs lie within a
# 20,000th of the room only the one that loses least is held.
STATES = 20_000
# Costs this close, as a share of the limit, are the same: sums in another order differ by as much.
_NOISE = 1e-9


def least_loss(items: Sequence[Sequence[tuple[float, float]]], limit: float) -> list[int]:
    """The option of every item that together cost no more than a limit and lose least.

    Dynamic programming, item by item, over the choices that no other both undercuts and outdoes; exact while there are
    no more than STATES of them. Between choices that lose the same, the cheaper is taken.

    Args:
        items: options (cost, loss) of each, none empty; losses are finite.
        limit: of the costs together.
    Returns:
        Position of the option of each item. [[(4, 0), (1, 3)], [(4, 0), (1, 2)]] within 5 gives [0, 1].
    Raises:
        PlanError: if the cheapest options cost more than the limit.
    """
    lows = [min(cost for cost, _ in options) for options in items]
    grain = _NOISE * max(abs(limit), sum(abs(low) for low in lows), 1e-300)
    room = limit - sum(lows)
    if room < -grain:
        raise PlanError("nothing is that cheap", why=f"the cheapest choice costs {sum(lows):,.6g} of {limit:,.6g}")
    costs, losses = np.zeros(1), np.zeros(1)
    # Of each state: the state of the item before that it came from, and the option taken.
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for options, low in zip(items, lows, strict=True):
        more = np.array([cost - low for cost, _ in options])
        lost = np.array([loss for _, loss in options])
        costs, losses, came = _extended(costs, losses, more, lost, room, grain)
        trail.append(came)
    chosen, state = [], int(losses.argmin())
    for before, option in reversed(trail):
        chosen.append(int(option[state]))
        state = int(before[state])
    return chosen[::-1]


def _extended(
    costs: np.ndarray, losses: np.ndarray, more: np.ndarray, lost: np.ndarray, room: float, grain: float
) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """States after one more item, by rising cost and falling loss, and where each came from."""
    cost = (costs[:, None] + more).ravel()
    loss = (losses[:, None] + lost).ravel()
    fits = np.flatnonzero(cost <= room + grain)
    # Within a grain the lower loss comes first, so that what follows it is dropped.
    order = fits[np.lexsort((loss[fits], np.round(cost[fits] / grain)))]
    best = np.minimum.accumulate(loss[order])
    kept = order[np.concatenate([[True], loss[order][1:] < best[:-1]])]
    if len(kept) > STATES:
        # Loss falls with cost, so the last of a bucket loses least.
        bucket = np.floor(cost[kept] / (room / STATES))
        kept = kept[np.concatenate([bucket[1:] != bucket[:-1], [True]])]
    before, option = np.divmod(kept, len(more))
    return cost[kept], loss[kept], (before.astype(np.int32), option.astype(np.int32))
