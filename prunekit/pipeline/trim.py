"""The vocabulary section of a recipe: tokens that a text does not need go, with their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from prunekit.checkpoint.vocabulary import Vocabulary, closed
from prunekit.core.errors import PlanError
from prunekit.plan.cost import cost
from prunekit.plan.plan import VOCAB, Plan
from prunekit.surgery.vocabulary import special_ids

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Recipe, Vocab
    from prunekit.pipeline.choose import Made
    from prunekit.structure.view import ModelView


def with_vocabulary(recipe: Recipe, made: Made, talk: Callable[[str], None]) -> Made:
    """The same with a plan that trims the vocabulary too, where the recipe asks for it.

    Raises:
        PrunekitError: where the tokenizer cannot lose tokens, or more must stay than may.
    """
    if recipe.vocab is None:
        return made
    from prunekit.calibrate.texts import load_text

    view = made.view
    require_vocabulary(view)
    vocabulary = Vocabulary.read(view.checkpoint.folder)
    counts = Counter(vocabulary.encode(load_text(recipe.vocab.data)))
    kept = kept_ids(vocabulary, counts, recipe.vocab, special_ids(view), view.vocabulary)
    plan = Plan.make(view, made.plan.drop, {**made.plan.keep, VOCAB: kept})
    seen = sum(counts.values())
    about = {
        "rows": view.vocabulary,
        "kept": len(kept),
        "covered": sum(counts[number] for number in kept) / max(1, seen),
        "tokens": seen,
    }
    talk(
        f"vocabulary: {len(kept):,} of {view.vocabulary:,} rows stay, {100 * about['covered']:.2f} % of the tokens of "
        f"`{recipe.vocab.data}`"
    )
    return replace(made, plan=plan, after=cost(view, plan), vocab=about)


def require_vocabulary(view: ModelView) -> None:
    """Fails where a model has no table of tokens that could lose rows.

    Raises:
        PlanError: if so.
    """
    if view.arch.stacks:
        why = "which tokens its encoder and its decoder need is not known"
        raise PlanError(f"the vocabulary of `{view.model_type}` cannot be trimmed", why=why, hint="leave `vocab` out")
    if not view.vocabulary:
        raise PlanError(f"`{view.model_type}` has no vocabulary to trim", hint="leave `vocab` out")


def kept_ids(
    vocabulary: Vocabulary, counts: Mapping[int, int], asked: Vocab, special: frozenset[int], rows: int
) -> list[int]:
    """Ids that stay, ascending: the most frequent, all they are built from, and those that always stay.

    Args:
        vocabulary: of the tokenizer.
        counts: how often each id comes in the text.
        asked: how many, or what share of the text's tokens.
        special: ids that the configuration names.
        rows: of the embedding.
    Raises:
        PlanError: if the tokenizer has ids that the embedding has no rows for, or what always stays is more than asked.
    """
    beyond = max(vocabulary.ids.values())
    if beyond >= rows:
        raise PlanError(f"the tokenizer has an id {beyond}", why=f"the embedding has {rows} rows")
    found = closed(vocabulary, ()) | special
    if asked.keep is not None and asked.keep < len(found):
        why = "special and added tokens, characters and bytes always stay"
        raise PlanError(f"`vocab.keep: {asked.keep}` is too few", why=f"{why}: {len(found)} of {rows}")
    names = {number: token for token, number in vocabulary.ids.items()}
    total = sum(counts.values())
    covered = sum(counts[number] for number in found if number in counts)
    # Equal counts: lower ids first, which come first in training.
    for number in sorted(names, key=lambda number: (-counts.get(number, 0), number)):
        if asked.coverage is not None and covered >= asked.coverage * total:
            break
        if number in found:
            continue
        more = vocabulary.parts(names[number]) - found
        if asked.keep is not None and len(found) + len(more) > asked.keep:
            continue
        found |= more
        covered += sum(counts.get(part, 0) for part in more)
    return sorted(_rounded_up(vocabulary, found, names, asked.multiple_of, rows))


def _rounded_up(
    vocabulary: Vocabulary, found: set[int], names: Mapping[int, str], multiple_of: int, rows: int
) -> set[int]:
    """With further tokens of low ids, whose parts all stay, up to a multiple; all rows where there are too few."""
    for number in sorted(names):
        if len(found) % multiple_of == 0:
            return found
        if number not in found and vocabulary.parts(names[number]) <= found | {number}:
            found.add(number)
    return found if len(found) % multiple_of == 0 else set(range(rows))
