"""Checks that need more than one key of a recipe: combinations, methods and their knobs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from prunekit.core.errors import PrunekitError
from prunekit.core.pattern_options import runtime_problems
from prunekit.core.recipe_evaluate import EXPECTATIONS
from prunekit.core.recipe_fields import knob_problems
from prunekit.core.recipe_heal import Heal, Training
from prunekit.core.recipe_learn import Gated, Learn
from prunekit.core.recipe_model import ALTERNATING, REGISTRIES, Repair
from prunekit.core.recipe_problems import Problem, near
from prunekit.core.registry import ATTENTIONS, GATES, HEALS, METRICS, REPAIRS, Registry
from prunekit.core.task_options import label_of, make_task, split_limit, task_problems
from prunekit.core.types import KINDS, WIDTH_KINDS
from prunekit.core.yaml_lines import KeyPath

# Keys of a budget that say what `latency_ms` is about, and what they are where they are not given.
LATENCY_KEYS = {"on": "torch", "batch": 1, "tokens": 128, "costs": None}
_NO_KV = ("ffn", "neurons", "query_heads", "experts", "hidden")


def combination_problems(data: Mapping[str, Any]) -> list[Problem]:
    """Keys that contradict each other, methods that do not exist or cannot do what they are asked for.

    Works on the recipe as read, so that a wrong type in one place hides nothing in another.
    """
    problems: list[Problem] = []
    steps = data.get("steps")
    if not steps and steps in (None, []) and data.get("learn") is None and data.get("vocab") is None:
        hint = "give `steps`, a list of removals, `learn` or `vocab`"
        problems.append(Problem("the recipe removes nothing", ("steps",), hint=hint))
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        if isinstance(step, Mapping) and "rewire" not in step:
            path: KeyPath = ("steps", index)
            problems += _budget(step, path)
            problems += _alternating(step, path)
            problems += _method(step, path)
    problems += _latency_steps(data)
    problems += _section(data, "repair", REPAIRS, Repair)
    for model, registry in ((Learn, GATES), (Heal, HEALS)):
        problems += _section(data, model.section, registry, model)
        problems += _training(data, model)
    problems += _attention(data)
    problems += _learn(data)
    problems += _vocab(data)
    for part in ("calibrate", "learn", "heal"):
        problems += _select(data, part)
    problems += runtime_problems(data.get("runtime"), _inside(data, "export", "formats"))
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
    kind, units, of = step.get("remove"), raw.get("units"), raw.get("of", "units")
    given = [key for key in ("remove", "units", "latency_ms") if raw.get(key) is not None]
    if not given:
        hint = "give `remove`, a fraction such as 0.2, `units`, a count, or `latency_ms`"
        yield Problem("the budget does not say how much goes", here, hint=hint)
    elif len(given) > 1:
        hint = f"keep one of them; `{given[1]}: null` takes that away"
        yield Problem(f"`{given[0]}` and `{given[1]}` are both given", (*here, given[1]), hint=hint)
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
    yield from _latency_target(kind, raw, here)
    if isinstance(step.get("by"), Mapping):
        yield from _currency(step, raw, here)


def _latency_target(kind: Any, raw: Mapping[str, Any], here: KeyPath) -> Iterator[Problem]:
    """Keys that go with `latency_ms`, and what it cannot choose."""
    if raw.get("latency_ms") is None:
        for key in LATENCY_KEYS:
            if raw.get(key) is not None:
                hint = "give `latency_ms`, or take it out"
                yield Problem(f"`{key}` is about a latency that is not given", (*here, key), hint=hint)
        return
    if raw.get("of") not in (None, "units"):
        why = "milliseconds are a measure of their own"
        yield Problem(f"`of: {raw['of']}` does not go with `latency_ms`", (*here, "of"), why=why, hint="take it out")
    if kind in ("query_heads", "experts"):
        why = f"cost tables do not hold widths of {kind}"
        hint = "use kv_groups, neurons or whole sub-layers"
        yield Problem(f"`latency_ms` does not go with `remove: {kind}`", (*here, "latency_ms"), why=why, hint=hint)


def _latency_steps(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Latency targets of several steps that are about different things, or that nothing could check."""
    steps = data.get("steps")
    found: list[tuple[int, Mapping[str, Any]]] = []
    for index, step in enumerate(steps if isinstance(steps, list) else []):
        budget = _inside(step, "budget")
        if isinstance(budget, Mapping) and budget.get("latency_ms") is not None:
            found.append((index, budget))
    for index, budget in found[1:]:
        for key, default in LATENCY_KEYS.items():
            if (budget.get(key) or default) != (found[0][1].get(key) or default):
                why = f"step {found[0][0] + 1} has another"
                place = ("steps", index, "budget", key)
                yield Problem(f"`{key}` must be the same in all steps", place, why=why, hint="measure one thing")
    formats = _inside(data, "export", "formats")
    for index, budget in found:
        if budget.get("on") == "onnxruntime" and (not isinstance(formats, list) or "onnx" not in formats):
            hint = "add it: `export: {formats: [safetensors, onnx]}`"
            yield Problem("`on: onnxruntime` needs the format onnx", ("steps", index, "budget", "on"), hint=hint)
    if not found and _inside(data, "expect", "latency_ms_max") is not None:
        why, hint = "nothing measures it", "give a step `budget: {latency_ms: ...}`, or use `evaluate.latency`"
        yield Problem("`latency_ms_max` needs a latency budget", ("expect", "latency_ms_max"), why=why, hint=hint)


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


def _section(data: Mapping[str, Any], key: str, registry: Registry, model: type[BaseModel]) -> list[Problem]:
    """Method and knobs of `repair`, `learn` or `heal`, which stand beside the keys that every method of them has."""
    raw = data.get(key)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("method"), str):
        return []
    name = raw["method"]
    if name not in registry.names():
        names = registry.names()
        hint = near(name, names) or f"there are: {', '.join(names)}"
        return [Problem(f"no {registry.role} named `{name}`", (key, "method"), hint=hint)]
    shared = [field for field in model.model_fields if field != "knobs"]
    knobs = {knob: value for knob, value in raw.items() if knob not in shared}
    return knob_problems(registry.get(name), knobs, (key,), shared)


def _learn(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Kinds that contradict each other."""
    kinds = _inside(data, "learn", "remove")
    kinds = [kind for kind in kinds if isinstance(kind, str)] if isinstance(kinds, list) else []
    for kind in sorted({kind for kind in kinds if kinds.count(kind) > 1}):
        yield Problem(f"`remove` names {kind} twice", ("learn", "remove"), hint="keep one of them")
    if "sublayers" in kinds and {"attention", "ffn"} & set(kinds):
        hint = "keep `sublayers`, or the kinds that can go"
        yield Problem("`sublayers` takes attention and FFN already", ("learn", "remove"), hint=hint)
    name = _inside(data, "learn", "method")
    known = GATES.get(name).kinds if isinstance(name, str) and name in GATES.names() else get_args(Gated)
    for kind in sorted({kind for kind in kinds if kind in get_args(Gated) and kind not in known}):
        others = [other for other in GATES.names() if kind in GATES.get(other).kinds]
        why, hint = f"it learns {', '.join(known)}", f"for {kind}: {', '.join(f'`{other}`' for other in others)}"
        yield Problem(f"`{name}` does not learn {kind}", ("learn", "remove", kinds.index(kind)), why=why, hint=hint)


def _training(data: Mapping[str, Any], model: type[Training]) -> Iterator[Problem]:
    """Numbers of `learn` or `heal` that do not go together."""
    section = model.section
    raw = data.get(section)
    if not isinstance(raw, Mapping):
        return
    batch, parts = raw.get("batch", model.model_fields["batch"].default), raw.get("accumulate", 1)
    if isinstance(batch, int) and isinstance(parts, int) and parts > 0 and batch % parts:
        why = "each pass takes the same number of sequences"
        yield Problem(f"`batch: {batch}` cannot be split into {parts} passes", (section, "accumulate"), why=why)
    if raw.get("patience") is not None and raw.get("held_out") in (0, 0.0):
        hint = "give `held_out`, a fraction such as 0.05"
        yield Problem("`patience` needs a held-out part", (section, "patience"), hint=hint)
    texts = raw.get("data")
    for index, text in enumerate(texts if isinstance(texts, list) else [texts]):
        if isinstance(text, Mapping) and text.get("prompts") is not None and text.get("data") != "teacher":
            hint = "take it out, or write `data: teacher`"
            place = (section, "data", index, "prompts")
            yield Problem("`prompts` is for text that the teacher writes", place, hint=hint)


def _vocab(data: Mapping[str, Any]) -> Iterator[Problem]:
    """What compares the ids or logits of the models before and after, which a smaller vocabulary numbers anew."""
    if data.get("vocab") is None:
        return
    if data.get("heal") is not None:
        why = "the teacher's tokens have other ids"
        yield Problem("`heal` does not go with `vocab`", ("heal",), why=why, hint="heal first, then trim the folder")
    for name in ("embedding", "kl"):
        if _inside(data, "evaluate", name) is not None:
            why = "the models read other ids"
            yield Problem(f"`evaluate.{name}` does not go with `vocab`", ("evaluate", name), why=why)


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


def _attention(data: Mapping[str, Any]) -> list[Problem]:
    """Name and knobs of the attention that healing trains with."""
    raw = _inside(data, "heal", "attention")
    given = {"method": raw} if isinstance(raw, str) else raw
    if not isinstance(given, Mapping) or not isinstance(given.get("method"), str):
        return []
    path, name, names = ("heal", "attention"), given["method"], ATTENTIONS.names()
    if name not in names:
        hint = near(name, names) or f"there are: {', '.join(names)}"
        return [Problem(f"no attention named `{name}`", path, hint=hint)]
    knobs = {key: value for key, value in given.items() if key != "method"}
    return knob_problems(ATTENTIONS.get(name), knobs, path, ["method"])


def _select(data: Mapping[str, Any], part: str) -> Iterator[Problem]:
    name = _inside(data, part, "select", "metric")
    if not isinstance(name, str):
        return
    usable = [metric for metric in METRICS.names() if "labels" not in METRICS.get(metric).needs]
    path = (part, "select", "metric")
    if name not in METRICS.names():
        yield Problem(f"no metric named `{name}`", path, hint=near(name, usable) or f"there are: {', '.join(usable)}")
    elif name not in usable:
        why = "it needs labels, which the text of a recipe has not"
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
