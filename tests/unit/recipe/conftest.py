"""A score and a search with known knobs stand for the registries, so that no test here depends on a real method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prunekit.core import recipe_model
from prunekit.core.errors import UsageError
from prunekit.core.recipe import InvalidRecipeError, load_recipe

FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=FORBID)
class Norm:
    """Size of the weights.

    A paragraph about it,
    over two lines.

    Args:
        power: which norm; `auto`
            takes the second.
        names: tensors that count.

    Returns:
        Nothing that a card shows.
    """

    kinds: ClassVar[tuple[str, ...]] = ("blocks", "kv_groups", "neurons")
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "A Paper, https://example.org/paper"
    evidence: ClassVar[str] = "text: section 2"
    deviations: ClassVar[str] = "sums in float32"
    status: ClassVar[str] = "stable"
    example: ClassVar[dict[str, Any]] = {"power": 1}

    power: int | Literal["auto"] = "auto"
    names: tuple[str, ...] = ("weight",)


@dataclass(frozen=True, config=FORBID)
class Greedy:
    """Takes what hurts least.

    Args:
        distance: how outputs are compared.
        front: fraction of the model that stays.
    """

    kinds: ClassVar[tuple[str, ...]] = ("blocks", "sublayers", "attention", "ffn")
    needs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = "Another Paper, https://example.org/other"
    evidence: ClassVar[str] = "code"
    deviations: ClassVar[str] = ""
    status: ClassVar[str] = "preview"
    example: ClassVar[dict[str, Any]] = {}

    distance: Literal["js", "kl"] = "js"
    front: float = Field(default=0.4, ge=0, le=1)

    def __post_init__(self) -> None:
        if self.distance == "kl" and self.front > 0.9:
            raise ValueError("kl needs more than a tenth of the model")


class Known:
    """A registry of given classes."""

    def __init__(self, **classes: type) -> None:
        self._classes = classes

    def names(self) -> tuple[str, ...]:
        return tuple(self._classes)

    def get(self, name: str) -> type:
        if name not in self._classes:
            raise UsageError(f"no method named `{name}`")
        return self._classes[name]


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """`norm` is the only score, `greedy` the only search."""
    monkeypatch.setitem(recipe_model.REGISTRIES, "score", Known(norm=Norm))
    monkeypatch.setitem(recipe_model.REGISTRIES, "search", Known(greedy=Greedy))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """`write(text)`: a recipe file with this text."""

    def to_file(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return to_file


@pytest.fixture
def problems(write: Callable[[str], Path]) -> Callable[..., list[Any]]:
    """`problems(text, overrides)`: what is wrong with a recipe; fails where nothing is."""

    def of(text: str, overrides: Sequence[str] = ()) -> list[Any]:
        with pytest.raises(InvalidRecipeError) as caught:
            load_recipe(write(text), overrides)
        return list(caught.value.problems)

    return of
