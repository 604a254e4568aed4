"""A written order serves every smaller budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prunekit.core.errors import PlanError, UsageError
from prunekit.core.types import Order, OrderStep
from prunekit.search.replay import Replay

ADDRESSES = tuple(f"blocks.{i}.{kind}" for i in range(3) for kind in ("attention", "ffn"))
ORDER = Order(
    "finercut",
    (OrderStep(("blocks.1.ffn",), 0.25), OrderStep(("blocks.0.ffn", "blocks.1.attention"), 0.5)),
    {"distance": "js"},
)


def model(protected: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(addresses=ADDRESSES, protected=frozenset(protected))


def removing(count: int) -> Callable[[frozenset[str]], bool]:
    return lambda removed: len(removed) >= count


def written(folder: Path, order: Order | dict[str, Any] = ORDER) -> str:
    data = order.to_json() if isinstance(order, Order) else order
    path = folder / "order.json"
    path.write_text(json.dumps({"method": "finercut", "kind": "sublayers", "results": [data]}))
    return str(path)


def steps(*units: tuple[str, ...]) -> Order:
    return Order("finercut", tuple(OrderStep(part, 0.1) for part in units))


@pytest.mark.parametrize(("count", "taken"), [(0, 0), (1, 1), (2, 2), (3, 2)])
def test_as_many_steps_are_taken_as_the_budget_needs(count: int, taken: int, tmp_path: Path) -> None:
    found = Replay(written(tmp_path)).propose(model(), removing(count))
    assert found.steps == ORDER.steps[:taken]
    assert found.provenance["order_of"] == "finercut"


def test_an_order_that_stops_early_says_so(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="stops before the budget") as error:
        Replay(written(tmp_path)).propose(model(), removing(4))
    assert error.value.why == "it has 2 steps"


def test_units_the_model_lacks_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path, steps(("blocks.2.ffn",), ("blocks.3.ffn",)))
    with pytest.raises(PlanError, match=r"the model has no `blocks\.3\.ffn`"):
        Replay(file).propose(model(), removing(1))


def test_protected_units_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"`blocks\.1\.ffn`, which is protected"):
        Replay(written(tmp_path)).propose(model(("blocks.1.ffn",)), removing(1))


def test_a_unit_that_goes_twice_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, steps(("blocks.2.ffn",), ("blocks.2.ffn",)))
    with pytest.raises(PlanError, match=r"`blocks\.2\.ffn` twice"):
        Replay(file).propose(model(), removing(1))


@pytest.mark.parametrize("kind", ["attention", "blocks"])
def test_an_order_of_another_kind_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"the order is not of {kind}"):
        Replay(written(tmp_path)).propose(model(), removing(1), kind=kind)


def test_whole_blocks_are_an_order_of_blocks(tmp_path: Path) -> None:
    order = steps(("blocks.2.attention", "blocks.2.ffn"))
    found = Replay(written(tmp_path, order)).propose(model(), removing(2), kind="blocks")
    assert found.steps == order.steps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"results": 3}',
        '{"results": []}',
        '{"results": [{"method": "gardener", "values": []}]}',
        '{"results": [{"method": "finercut", "steps": [{"units": [], "distance": 1}]}]}',
        '{"results": [{"method": "finercut", "steps": [{"units": [7], "distance": 1}]}]}',
        '{"results": [{"method": "finercut", "steps": [3]}]}',
    ],
)
def test_files_that_hold_no_order_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "order.json").write_text(text)
    with pytest.raises(UsageError) as error:
        Replay(str(tmp_path / "order.json")).propose(model(), removing(1))
    assert "prunekit score" in error.value.hint


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        Replay(str(tmp_path / "none.json")).propose(model(), removing(1))
