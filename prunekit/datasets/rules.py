"""Which examples stay, from scores alone: hard or easy, a floor for each class, a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from prunekit.core.errors import UsageError

RuleName = Literal["hard", "easy", "auto"]
# Kept examples a parameter from which hard ones are worth more than easy ones, by what is trained. The paper reckons
# in examples a parameter but gives no number for the crossover ("abundant", "scarce"); these are ours. A head is the
# perceptron of its theory. Whole networks have far more weights than examples all the same: a ResNet-50 on ImageNet,
# which loses its easiest fifth unharmed, keeps 0.04; a ResNet-18 on CIFAR-10 keeps 0.004.
PLENTY: Mapping[str, float] = {"head": 10.0, "model": 0.02}
# Tokens a parameter that training a language model uses up, https://arxiv.org/abs/2203.15556.
TOKENS_A_PARAMETER = 20


@dataclass(frozen=True)
class Rule:
    """What stays.

    Args:
        keep: fraction of the examples that stays; None where a count is given.
        examples: how many examples stay.
        tokens: how many tokens the kept examples may have together.
        rule: `hard` keeps the highest scores, `easy` the lowest, `auto` decides.
        class_floor: share of its proportional part that each class keeps at least, 0 to 1.
        seed: decides among equal scores.
    """

    keep: float | None = None
    examples: int | None = None
    tokens: int | None = None
    rule: RuleName = "auto"
    class_floor: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        given = [name for name in ("keep", "examples", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            what = f"{' and '.join(f'`{name}`' for name in given)} are given" if given else "no budget is given"
            raise UsageError(what, hint="give one of: --keep 0.3, --examples 1000, --tokens 100000")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UsageError(f"`keep: {self.keep:g}` is out of range", why="it is the fraction kept: 0 < keep <= 1")
        for name in ("examples", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"`{name}: {value}` is out of range", why="at least 1")
        if not 0 <= self.class_floor <= 1:
            raise UsageError(f"`class_floor: {self.class_floor:g}` is out of range", why="0 <= class_floor <= 1")


@dataclass(frozen=True)
class Facts:
    """What `auto` knows about the data.

    Args:
        trained: weights of the classifier that learns the labels, None without labels or where nobody knows.
        trains: what that classifier is, a head or the whole model.
        tokens: of all texts together, None where nobody counted.
        params: weights of the model that gave the scores, None without one.
    """

    trained: int | None = None
    trains: Literal["head", "model"] = "head"
    tokens: int | None = None
    params: int | None = None


def decide(rule: RuleName, n_keep: int, share: float, facts: Facts) -> tuple[Literal["hard", "easy"], str]:
    """`hard` or `easy`, and why.

    Args:
        n_keep: examples that stay.
        share: fraction that stays.
    """
    if rule != "auto":
        return rule, "asked for"
    if facts.trained:
        each, bound = n_keep / facts.trained, PLENTY[facts.trains]
        plenty = each >= bound
        what = f"{facts.trained:,} weights of the {facts.trains}"
        why = f"{each:.3g} kept examples a parameter ({what}), {'at least' if plenty else 'under'} {bound:g}"
    elif facts.tokens is not None and facts.params:
        each = share * facts.tokens / facts.params
        plenty = each >= TOKENS_A_PARAMETER
        why = f"{each:.3g} kept tokens a parameter, {'at least' if plenty else 'under'} {TOKENS_A_PARAMETER}"
    else:
        plenty = False
        how = "score labels with a metric that embeds, text without labels with --metric length and --model"
        why = f"nobody counted parameters ({how}), so data counts as scarce"
    return ("hard" if plenty else "easy"), why


def n_kept(rule: Rule, n: int) -> int:
    """Examples that stay of `n`, at least 1; for a token budget, n. 0.3 of 10 is 3.

    Raises:
        UsageError: if more are asked for than there are.
    """
    if rule.examples is not None and rule.examples > n:
        raise UsageError(f"`examples: {rule.examples}` is more than the {n} there are")
    if rule.examples is not None:
        return rule.examples
    return n if rule.keep is None else max(1, round(rule.keep * n))


def ranking(scores: np.ndarray, hard: bool, seed: int) -> np.ndarray:
    """Positions in the order in which they are kept, int64 [n]; equal scores in an order drawn from the seed."""
    chance = np.random.default_rng(seed).random(len(scores))
    return np.lexsort((chance, -scores if hard else scores))


def choose(
    order: np.ndarray, rule: Rule, n: int, labels: np.ndarray | None = None, tokens: np.ndarray | None = None
) -> np.ndarray:
    """Positions that stay, ascending.

    Each class first keeps the best of its own up to its floor; what the budget has left goes to the best of the rest.
    With 8 examples of class a, 2 of b, keep 0.5 and floor 0.5: b keeps at least floor(0.5 * 5 * 2 / 10) = 0, a 2.

    Args:
        order: candidates, best first; what is missing from it (near duplicates) cannot stay.
        n: size of the data set, which the fraction is of.
        labels: class numbers [n]; None without labels.
        tokens: tokens of each example [n], for a token budget.
    """
    cost = np.ones(n, np.int64)
    budget = n_kept(rule, n)
    if rule.tokens is not None:
        if tokens is None:
            raise UsageError("a token budget needs token counts", hint="score with --metric length too")
        cost, budget = tokens.astype(np.int64), rule.tokens
    if labels is not None and rule.class_floor:
        order = _floors_first(order, labels, cost, budget, rule.class_floor)
    fits = np.cumsum(cost[order]) <= budget
    found = np.sort(order[fits])
    if not len(found):
        raise UsageError(f"`tokens: {budget}` keeps nothing", why=f"the first example has {cost[order[0]]} tokens")
    return found


def _floors_first(
    order: np.ndarray, labels: np.ndarray, cost: np.ndarray, budget: int, class_floor: float
) -> np.ndarray:
    """The same candidates, each class's floor in front."""
    share = min(1.0, budget / max(1, cost.sum()))
    early = np.zeros(len(order), bool)
    for code in np.unique(labels):
        mine = np.flatnonzero(labels[order] == code)
        spent = np.cumsum(cost[order[mine]])
        early[mine[spent <= class_floor * share * cost[labels == code].sum()]] = True
    return np.concatenate([order[early], order[~early]])
