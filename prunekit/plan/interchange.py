"""Plans in the formats of other tools, read and written; what a format cannot say is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import PlanError
from prunekit.core.yaml_lines import read_value
from prunekit.plan import layer_formats
from prunekit.plan.plan import Plan

if TYPE_CHECKING:
    from prunekit.structure.view import ModelView

_MAX_BYTES = 200_000_000
_BLOCKS = re.compile(r"\s*(?:--prune-layers[ =])?\s*(\d+(?:\s*,\s*\d+)*)\s*")
_DROPS = {"drop_attn_list": "attention", "drop_mlp_list": "ffn"}


@dataclass(frozen=True)
class Format:
    """A format of plans.

    Args:
        is_it: whether parsed content is of this format.
        read: the plan that parsed content stands for.
        write: text of a plan; the last argument is what the model is called.
    """

    is_it: Callable[[Any], bool]
    read: Callable[[ModelView, Any], Plan]
    write: Callable[[ModelView, Plan, str], str]


def read_plan(path: Path, view: ModelView) -> Plan:
    """The plan in a file of any format that `FORMATS` has, told by its content.

    Args:
        path: JSON, YAML, or a list of block numbers.
        view: the model that it is for.
    Raises:
        PlanError: if the file is no plan, says what a plan of prunekit cannot, or does not fit the model.
    """
    data = _parsed(path)
    name = next((name for name, format_ in FORMATS.items() if format_.is_it(data)), None)
    if name is None:
        raise _no_plan(path, f"it is none of {', '.join(FORMATS)}")
    try:
        _require_plain(view, name)
        plan = FORMATS[name].read(view, data)
        plan.check(view)
    except PlanError as error:
        raise PlanError(error.what, error.why, error.hint, error.at or f"{path}, read as {name}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_plan(path, " ".join(str(error).split())[:200]) from error
    return plan


def plan_text(view: ModelView, plan: Plan, name: str, model: str) -> str:
    """A plan as text in a format.

    Args:
        view: the model that it is for.
        plan: the cuts.
        name: key of `FORMATS`.
        model: what the model is called where the format names it.
    Raises:
        PlanError: if the format cannot say the plan, or there is no such format.
    """
    if name not in FORMATS:
        raise PlanError(f"no plan format named `{name}`", hint=f"there are: {', '.join(FORMATS)}")
    try:
        return _written(view, plan, name, model)
    except PlanError as error:
        others = [other for other in FORMATS if other != name and _can(view, plan, other)]
        raise PlanError(
            f"`{name}` cannot say this plan", error.what, f"formats that can: {', '.join(others)}"
        ) from error


def _written(view: ModelView, plan: Plan, name: str, model: str) -> str:
    _require_plain(view, name)
    return FORMATS[name].write(view, plan, model)


def _can(view: ModelView, plan: Plan, name: str) -> bool:
    try:
        _written(view, plan, name, "")
    except PlanError:
        return False
    return True


def _require_plain(view: ModelView, name: str) -> None:
    if name != "prunekit" and view.arch.stacks:
        raise PlanError("the model has several stacks of blocks, which only plans of prunekit tell apart")
    if name != "prunekit" and view.heterogeneous:
        raise PlanError("the model's blocks differ already, which only plans of prunekit know")


def _no_plan(path: Path, why: str) -> PlanError:
    return PlanError(f"`{path}` is not a plan", why, "`prunekit plan --recipe FILE --output plan.json` makes one")


def _parsed(path: Path) -> Any:
    """JSON or YAML as values, a list of block numbers as a tuple."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise PlanError(f"`{path}` is larger than any plan")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"`{path}` cannot be read", why=error.strerror or str(error)) from error
    except ValueError as error:
        raise _no_plan(path, "it is not text") from error
    listed = _BLOCKS.fullmatch(text)
    try:
        if listed:
            return tuple(int(number) for number in listed[1].split(","))
        return json.loads(text) if text.lstrip().startswith(("{", "[")) else read_value(text)
    except (ValueError, RecursionError) as error:
        raise _no_plan(path, " ".join(str(error).split())[:200]) from error


def _has(*keys: str) -> Callable[[Any], bool]:
    return lambda data: isinstance(data, Mapping) and any(key in data for key in keys)


def _read_own(view: ModelView, data: Any) -> Plan:
    # A manifest, and what `--json` prints, hold a plan.
    return Plan.from_json(data["plan"] if isinstance(data["plan"], Mapping) else data)


def _write_own(view: ModelView, plan: Plan, model: str) -> str:
    return _json(plan.to_json())


def _json(data: Any) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _whole_blocks(view: ModelView, plan: Plan) -> list[int]:
    """Numbers of the blocks that go.

    Raises:
        PlanError: if something else goes.
    """
    if plan.keep:
        raise PlanError(f"it narrows `{next(iter(plan.keep))}`, and the format removes whole blocks")
    gone = []
    for block in view.blocks:
        left = [s.address for s in block.sublayers if s.address not in plan.drop]
        if left and len(left) < len(block.sublayers):
            raise PlanError(f"it removes a part of block {block.index}, and the format removes whole blocks")
        if not left:
            gone.append(block.index)
    return gone


def _without(view: ModelView, numbers: Iterable[int], kinds: Iterable[str] = ("attention", "ffn")) -> list[str]:
    """Addresses of the sub-layers of these kinds in these blocks."""
    numbers = list(numbers)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(view.blocks):
            raise PlanError(f"there is no block {number!r}", why=f"the model has blocks 0 to {len(view.blocks) - 1}")
        if numbers.count(number) > 1:
            raise PlanError(f"block {number} is removed twice")
    return [f"blocks.{number}.{kind}" for number in numbers for kind in kinds]


def _read_list(view: ModelView, data: Any) -> Plan:
    return Plan.make(view, _without(view, data))


def _write_list(view: ModelView, plan: Plan, model: str) -> str:
    gone = _whole_blocks(view, plan)
    if not gone:
        raise PlanError("it removes nothing, and the format has no empty list")
    return ",".join(map(str, gone)) + "\n"


def _read_slices(view: ModelView, data: Any) -> Plan:
    _only(data, ("slices", "merge_method", "dtype", "name"), "the file")
    if data.get("merge_method", "passthrough") != "passthrough":
        raise PlanError(f"`merge_method: {data['merge_method']}` is no cut", hint="passthrough is")
    kept: list[int] = []
    models = set()
    for entry in data["slices"]:
        _only(entry, ("sources",), "a slice")
        if len(entry["sources"]) != 1:
            raise PlanError("a slice has several sources, which is a merge and no cut")
        source = entry["sources"][0]
        _only(source, ("model", "layer_range"), "a source")
        models.add(str(source["model"]))
        start, end = source["layer_range"]
        if isinstance(start, bool) or isinstance(end, bool) or not 0 <= int(start) < int(end) <= len(view.blocks):
            why = f"the model has {len(view.blocks)} blocks; the end does not count"
            raise PlanError(f"`layer_range: [{start}, {end}]` is not in the model", why=why)
        kept += range(start, end)
    if len(models) > 1:
        raise PlanError("the slices are of several models, which is a merge and no cut", why=", ".join(sorted(models)))
    if kept != sorted(set(kept)):
        raise PlanError("the slices repeat or reorder blocks, which is no cut")
    return Plan.make(view, _without(view, sorted(set(range(len(view.blocks))) - set(kept))))


def _only(entry: Any, known: tuple[str, ...], where: str) -> None:
    other = next((key for key in entry if key not in known), None)
    if other is not None:
        raise PlanError(f"`{other}` in {where} is not what a plan can say", hint=f"known: {', '.join(known)}")


def _write_slices(view: ModelView, plan: Plan, model: str) -> str:
    import yaml

    gone = set(_whole_blocks(view, plan))
    ranges: list[list[int]] = []
    for number in range(len(view.blocks)):
        if number not in gone:
            if ranges and ranges[-1][1] == number:
                ranges[-1][1] += 1
            else:
                ranges.append([number, number + 1])
    slices = [{"sources": [{"model": model, "layer_range": kept}]} for kept in ranges]
    return str(yaml.safe_dump({"slices": slices, "merge_method": "passthrough"}, sort_keys=False, allow_unicode=True))


def _read_drops(view: ModelView, data: Any) -> Plan:
    depth = data.get("num_hidden_layers", len(view.blocks))
    if depth != len(view.blocks):
        raise PlanError(f"the lists are for {depth} blocks", why=f"the model has {len(view.blocks)}")
    drop = []
    for key, kind in _DROPS.items():
        listed = data.get(key) or []
        flags = [isinstance(entry, bool) for entry in listed]
        if listed and all(flags):
            if len(listed) != depth:
                raise PlanError(f"`{key}` has {len(listed)} entries", why=f"the model has {depth} blocks")
            listed = [number for number, gone in enumerate(listed) if gone]
        drop += _without(view, listed, (kind,))
    return Plan.make(view, drop)


def _write_drops(view: ModelView, plan: Plan, model: str) -> str:
    if plan.keep:
        raise PlanError(f"it narrows `{next(iter(plan.keep))}`, and the format removes whole sub-layers")
    lists: dict[str, list[int]] = {key: [] for key in _DROPS}
    for address in plan.drop:
        _, number, kind = address.split(".")
        lists["drop_attn_list" if kind == "attention" else "drop_mlp_list"].append(int(number))
    return _json(lists)


def _write_block_configs(view: ModelView, plan: Plan, model: str) -> str:
    return _json(layer_formats.block_configs(view, plan))


def _write_per_layer(view: ModelView, plan: Plan, model: str) -> str:
    return _json(layer_formats.per_layer_config(view, plan))


FORMATS: dict[str, Format] = {
    "prunekit": Format(_has("plan"), _read_own, _write_own),
    "mergekit": Format(_has("slices"), _read_slices, _write_slices),
    "llama_quantize": Format(lambda data: isinstance(data, tuple), _read_list, _write_list),
    "llm_drop": Format(_has(*_DROPS), _read_drops, _write_drops),
    "block_configs": Format(_has("block_configs"), layer_formats.read_block_configs, _write_block_configs),
    "per_layer_config": Format(
        _has("per_layer_config", "prunekit"), layer_formats.read_per_layer_config, _write_per_layer
    ),
}
