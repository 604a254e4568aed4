"""Registry and what methods hand over."""

from __future__ import annotations

import json

import pytest

from prunekit.core.errors import PrunekitError, UsageError
from prunekit.core.registry import HEALS, REPAIRS, SCORES, SEARCHES, Registry
from prunekit.core.types import Order, OrderStep, Scores


@pytest.mark.parametrize("registry", [SCORES, SEARCHES], ids=["scores", "searches"])
def test_every_method_imports_and_says_what_it_is(registry: Registry) -> None:
    for name in registry.names():
        cls = registry.get(name)
        assert cls.__name__.lower() == name.replace("_", "")
        assert cls.kinds
        assert cls.evidence
        assert cls.status in ("preview", "stable")
        cls(**cls.example)


@pytest.mark.parametrize("registry", [REPAIRS, HEALS], ids=["repairs", "heals"])
def test_every_method_after_the_cut_says_what_it_is(registry: Registry) -> None:
    assert registry.names()
    for name in registry.names():
        cls = registry.get(name)
        assert cls.__name__.lower() == name.replace("_", "")
        assert cls.evidence
        assert cls.status in ("preview", "stable")
        cls(**cls.example)


def test_unknown_name_suggests_the_near_one() -> None:
    with pytest.raises(UsageError) as caught:
        SCORES.get("gardner")
    assert caught.value.hint == "did you mean `gardener`?"


def test_private_files_are_no_methods() -> None:
    assert not [name for name in SCORES.names() if name.startswith("_")]
    with pytest.raises(UsageError):
        SCORES.get("_weights")


def test_file_without_its_class_is_an_error() -> None:
    with pytest.raises(PrunekitError, match="no class named like its file"):
        Registry("thing", "prunekit.core").get("rounding")


def test_orders_and_scores_are_plain_json() -> None:
    order = Order("finercut", (OrderStep(("blocks.1.ffn",), 0.5),), {"distance": "js"})
    assert json.loads(json.dumps(order.to_json()))["steps"] == [{"units": ["blocks.1.ffn"], "distance": 0.5}]
    scores = Scores("random", "blocks", ("blocks.0",), (1.0,))
    assert json.loads(json.dumps(scores.to_json()))["values"] == [1.0]
