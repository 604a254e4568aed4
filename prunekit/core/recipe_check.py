"""Checks that need more than one key of a recipe: combinations, methods and their knobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from prunekit.core.errors import PrunekitError
from prunekit.core.recipe_evaluate import EXPECTATIONS
from prunekit.core.recipe_fields import knob_problems
from prunekit.core.recipe_heal import Heal
from prunekit.core.recipe_model import ALTERNATING, REGISTRIES, WIDTH_KINDS, Kind, Repair
from prunekit.core.recipe_problems import Problem, near
from prunekit.core.registry import HEALS, METRICS, REPAIRS, Registry
from prunekit.core.task_options import label_of, make_task, split_limit, task_problems
from prunekit.core.yaml_lines import KeyPath

KINDS = get_args(Kind)
_NO_KV = ("ffn", "neurons", "query_heads", "experts")


def combination_problems(data: Mapping[str, Any]) -> list[Problem]:
    """Keys that contradict each other, methods that do not exist or cannot do what they are asked for.

    Works on the recipe as read, so that a wrong type in one place hides nothing in another.
    """
    problems: list[Problem] = []
    steps = data.get("steps")
    if not steps and steps in (None, []) and data.get("vocab") is None:
        hint = "give `steps`, a list of removals, or `vocab`"
        problems.append(Problem("the recipe removes nothing", ("steps",), hint=hint))
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        if isinstance(step, Mapping) and "rewire" not in step:
            path: KeyPath = ("steps", index)
            problems += _budget(step, path)
            problems += _alternating(step, path)
            problems += _method(step, path)
    problems += _after_cut(data, "repair", REPAIRS, Repair)
    problems += _after_cut(data, "heal", HEALS, Heal)
    problems += _heal(data)
    problems += _vocab(data)
    problems += _select(data)
    problems += _export(data)
    problems += _require(data)
    tasks = _inside(data, "evaluate", "tasks")
    figures, found = _tasks(tasks if isinstance(tasks, list) else [])
    problems += found
    problems += _expect(data)
    problems += _figure_limits(_inside(data, "expect", "figures"), figures)
    return problems


def _tasks(tasks: list[Any]) -> tuple[dict[str, tuple[str, ...]], list[Problem]]:
    """Figures of every sound task by its label, and what is wrong with the others."""
    figures: dict[str, tuple[str, ...]] = {}
    problems: list[Problem] = []
    for index, entry in enumerate(tasks):
        path: KeyPath = ("evaluate", "tasks", index)
        given = {"task": entry} if isinstance(entry, str) else entry
        if not isinstance(given, Mapping) or not isinstance(given.get("task"), str):
            continue
        options = {key: value for key, value in given.items() if key not in ("task", "name")}
        found = task_problems(given["task"], options, path)
        problems += found
        if found:
            continue
        task = make_task(given["task"], options)
        name = given.get("name")
        label = label_of(given["task"], task, name if isinstance(name, str) else None)
        if label in figures:
            hint = "give one of them another with `name`"
            problems.append(Problem(f"two tasks go by the name `{label}`", path, hint=hint))
        figures[label] = task.figures
    return figures, problems


def _figure_limits(limits: Any, figures: Mapping[str, tuple[str, ...]]) -> Iterator[Problem]:
    """`expect.figures` keys that name no task, or a figure that it does not give."""
    for key in limits if isinstance(limits, Mapping) else ():
        path: KeyPath = ("expect", "figures", key)
        split = split_limit(str(key), figures)
        if split is None:
            hint = "write `arc_easy.acc_min: 0.4`: a task's name, its figure, then _min or _max"
            yield Problem(f"`{key}` is no limit of a figure", path, hint=hint)
            continue
        label, figure = split
        if label not in figures:
            known = f"there are: {', '.join(figures)}" if figures else "add it to `evaluate.tasks`"
            yield Problem(f"`evaluate.tasks` has no `{label}`", path, hint=near(label, figures) or known)
        elif figures[label] and figure not in figures[label]:
            hint = near(figure, figures[label]) or f"there are: {', '.join(figures[label])}"
            yield Problem(f"`{label}` gives no figure `{figure}`", path, hint=hint)


def _budget(step: Mapping[str, Any], path: KeyPath) -> Iterator[Problem]:
    raw = step.get("budget")
    if not isinstance(raw, Mapping):
        return
    here = (*path, "budget")
    kind, remove, units, of = step.get("remove"), raw.get("remove"), raw.get("units"), raw.get("of", "units")
    if remove is None and units is None:
        hint = "give `remove`, a fraction such as 0.2, or `units`, a count"
        yield Problem("the budget does not say how much goes", here, hint=hint)
    elif remove is not None and units is not None:
        hint = "keep one of them; `units: null` takes the other away"
        yield Problem("`remove` and `units` are both given", (*here, "units"), hint=hint)
    if units is not None and of != "units" and isinstance(of, str):
        hint = f"leave `of` out, or give `remove`, a fraction of {of}"
        yield Problem(f"`units: {units}` with `of: {of}` mixes two measures", (*here, "of"), hint=hint)
    if kind in KINDS and kind not in WIDTH_KINDS and raw.get("multiple_of", 1) not in (1, None):
        why = "multiples are for widths; these go whole"
        yield Problem(
            f"`multiple_of` does not go with `remove: {kind}`", (*here, "multiple_of"), why=why, hint="take it out"
        )
    if of == "kv_bytes" and kind in _NO_KV:
        why = f"removing {kind} changes no byte of the KV cache"
        yield Problem(f"`of: kv_bytes` does not go with `remove: {kind}`", (*here, "of"), why=why, hint="use params")
    if isinstance(step.get("by"), Mapping):
        yield from _currency(step, raw, here)


def _currency(step: Mapping[str, Any], raw: Mapping[str, Any], here: KeyPath) -> Iterator[Problem]:
    """Budgets that only a search, or only a score, can keep."""
    scored = "score" in step["by"]
    if raw.get("of") == "latency_ms" and (scored or step.get("remove") in WIDTH_KINDS):
        why = "only a search over whole blocks and sub-layers measures time"
        yield Problem("`of: latency_ms` is not possible here", (*here, "of"), why=why, hint="use flops or params")
    if not scored and raw.get("within") in ("group", "kind"):
        why = "a search orders the units of the whole model"
        hint = "take it out, or use a score"
        yield Problem(f"`within: {raw['within']}` does not go with a search", (*here, "within"), why=why, hint=hint)


def _alternating(step: Mapping[str, Any], path: KeyPath) -> Iterator[Problem]:
    """What `keep_alternating` does not go with."""
    budget, by, kind = step.get("budget"), step.get("by"), step.get("remove")
    if not isinstance(budget, Mapping) or budget.get("keep_alternating") is not True:
        return
    if kind in KINDS and kind != "sublayers":
        why = "whole blocks and widths leave them taking turns" if kind not in ("attention", "ffn") else ""
        what = f"`keep_alternating` does not go with `remove: {kind}`"
        hint = "take it out" if why else "use `remove: sublayers`, which takes both"
        yield Problem(what, (*path, "budget", "keep_alternating"), why=why, hint=hint)
    candidates = by.get("candidates") if isinstance(by, Mapping) else None
    if isinstance(candidates, str) and candidates not in ALTERNATING:
        what = f"`candidates: {candidates}` contradicts `keep_alternating`"
        why = "single sub-layers would break the turns of attention and FFN"
        yield Problem(what, (*path, "by", "candidates"), why=why, hint="take `candidates` out, or use pairs")


def _method(step: Mapping[str, Any], path: KeyPath) -> list[Problem]:
    by = step.get("by")
    if not isinstance(by, Mapping):
        return []
    here = (*path, "by")
    given = [role for role in REGISTRIES if by.get(role) is not None]
    if len(given) != 1:
        what = "`score` and `search` are both given" if given else "`by` names no method"
        return [Problem(what, here, hint="give `score: NAME` or `search: NAME`; `prunekit methods list` shows them")]
    role, name = given[0], by[given[0]]
    if not isinstance(name, str):
        return []
    if name not in REGISTRIES[role].names():
        return [Problem(f"no {role} named `{name}`", (*here, role), hint=_which(role, name))]
    try:
        cls = REGISTRIES[role].get(name)
    except PrunekitError as error:
        return [Problem(error.what, (*here, role), why=error.why, hint=error.hint)]
    problems = _kinds(cls, name, step.get("remove"), path)
    return problems + knob_problems(cls, {k: v for k, v in by.items() if k not in REGISTRIES}, here)


def _after_cut(data: Mapping[str, Any], key: str, registry: Registry, model: type[BaseModel]) -> list[Problem]:
    """Method and knobs of `repair` or `heal`, which stand beside the keys that every method of them has."""
    raw = data.get(key)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("method"), str):
        return []
    name = raw["method"]
    if name not in registry.names():
        names = registry.names()
        hint = near(name, names) or f"there are: {', '.join(names)}"
        return [Problem(f"no {key} named `{name}`", (key, "method"), hint=hint)]
    shared = [field for field in model.model_fields if field != "knobs"]
    knobs = {knob: value for knob, value in raw.items() if knob not in shared}
    return knob_problems(registry.get(name), knobs, (key,), shared)


def _heal(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Numbers of `heal` that do not go together."""
    raw = data.get("heal")
    if not isinstance(raw, Mapping):
        return
    batch, parts = raw.get("batch", Heal.model_fields["batch"].default), raw.get("accumulate", 1)
    if isinstance(batch, int) and isinstance(parts, int) and parts > 0 and batch % parts:
        why = "each pass takes the same number of sequences"
        yield Problem(f"`batch: {batch}` cannot be split into {parts} passes", ("heal", "accumulate"), why=why)
    if raw.get("patience") is not None and raw.get("held_out") in (0, 0.0):
        hint = "give `held_out`, a fraction such as 0.05"
        yield Problem("`patience` needs a held-out part", ("heal", "patience"), hint=hint)
    texts = raw.get("data")
    for index, text in enumerate(texts if isinstance(texts, list) else [texts]):
        if isinstance(text, Mapping) and text.get("prompts") is not None and text.get("data") != "teacher":
            hint = "take it out, or write `data: teacher`"
            yield Problem(
                "`prompts` is for text that the teacher writes", ("heal", "data", index, "prompts"), hint=hint
            )


def _vocab(data: Mapping[str, Any]) -> Iterator[Problem]:
    """What compares the ids or logits of the models before and after, which a smaller vocabulary numbers anew."""
    if data.get("vocab") is None:
        return
    if data.get("heal") is not None:
        why = "the teacher's tokens have other ids"
        yield Problem("`heal` does not go with `vocab`", ("heal",), why=why, hint="heal first, then trim the folder")
    if _inside(data, "evaluate", "embedding") is not None:
        why = "the models read other ids"
        yield Problem("`evaluate.embedding` does not go with `vocab`", ("evaluate", "embedding"), why=why)


def _which(role: str, name: str) -> str:
    for other, registry in REGISTRIES.items():
        if other != role and name in registry.names():
            return f"`{name}` is a {other}: write `{other}: {name}`"
    names = REGISTRIES[role].names()
    return near(name, names) or f"there are: {', '.join(names)}"


def _kinds(cls: type, name: str, kind: Any, path: KeyPath) -> list[Problem]:
    kinds = tuple(getattr(cls, "kinds", KINDS))
    if kind not in KINDS or kind in kinds:
        return []
    others = [f"`{n}`" for r in REGISTRIES.values() for n in r.names() if kind in getattr(r.get(n), "kinds", ())]
    return [
        Problem(
            f"`{name}` cannot choose {kind}",
            (*path, "remove"),
            why=f"it chooses {', '.join(kinds)}",
            hint=f"for {kind}: {', '.join(others)}" if others else "no method chooses these yet",
        )
    ]


def _select(data: Mapping[str, Any]) -> Iterator[Problem]:
    name = _inside(data, "calibrate", "select", "metric")
    if not isinstance(name, str):
        return
    usable = [metric for metric in METRICS.names() if "labels" not in METRICS.get(metric).needs]
    path = ("calibrate", "select", "metric")
    if name not in METRICS.names():
        yield Problem(f"no metric named `{name}`", path, hint=near(name, usable) or f"there are: {', '.join(usable)}")
    elif name not in usable:
        why = "it needs labels, which calibration data has not"
        yield Problem(f"`metric: {name}` is not possible here", path, why=why, hint=f"use one of: {', '.join(usable)}")


def _export(data: Mapping[str, Any]) -> Iterator[Problem]:
    formats = _inside(data, "export", "formats")
    if not isinstance(formats, list):
        return
    if formats and "safetensors" not in formats:
        why = "other formats are made from the safetensors checkpoint"
        yield Problem("`formats` lacks safetensors", ("export", "formats"), why=why, hint="add safetensors")
    twice = {f for f in formats if isinstance(f, str) and formats.count(f) > 1}
    for name in sorted(twice):
        yield Problem(f"`formats` names {name} twice", ("export", "formats"), hint="keep one of them")


def _require(data: Mapping[str, Any]) -> Iterator[Problem]:
    required = data.get("require")
    names = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem(f"`require` names {name} twice", ("require",), hint="keep one of them")
    if "transformers" in names and _inside(data, "export", "layout") == "heterogeneous":
        why = "a heterogeneous layout has classes of its own"
        yield Problem("`require: transformers` contradicts `layout: heterogeneous`", ("require",), why=why)


def _expect(data: Mapping[str, Any]) -> Iterator[Problem]:
    expect = data.get("expect")
    if not isinstance(expect, Mapping):
        return
    formats = _inside(data, "export", "formats")
    for key, value in expect.items():
        needs = EXPECTATIONS[key].needs if key in EXPECTATIONS else ""
        if value is None or not needs:
            continue
        if needs == "export.formats":
            if not isinstance(formats, list) or "onnx" not in formats:
                hint = "add it: `export: {formats: [safetensors, onnx]}`"
                yield Problem(f"`{key}` needs the format onnx", ("expect", key), hint=hint)
        elif _inside(data, *needs.split(".")) is None:
            why, hint = f"without `{needs}` nothing measures it", f"add `{needs.replace('.', ': {')}: ...}}`"
            yield Problem(f"`{key}` needs `{needs}`", ("expect", key), why=why, hint=hint)
    if expect.get("loads_stock") is True and _inside(data, "export", "layout") == "heterogeneous":
        why = "a heterogeneous layout has classes of its own"
        yield Problem("`loads_stock` contradicts `layout: heterogeneous`", ("expect", "loads_stock"), why=why)


def _inside(data: Any, *path: str) -> Any:
    for key in path:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data
