"""Where the result of a plan loads, known before the cut: yes, no with the reason, or not known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import PlanError
from prunekit.modeling.families import auto_class
from prunekit.plan.cost import kept_hidden, kept_widths
from prunekit.plan.gguf_rules import GRAPHS, RUN_WITH, gguf_layout
from prunekit.plan.layer_formats import DECILM_FAMILIES, block_configs, decilm_notes
from prunekit.plan.layout import Layout, choose_layout
from prunekit.plan.plan import Plan
from prunekit.structure.parts import HIDDEN

if TYPE_CHECKING:
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView

_CLASS_PREFIX = "Prunekit"
# Runtimes with model code of their own, as `runtimes.yaml` describes them.
_FILE = Path(__file__).with_name("runtimes.yaml")
# Families that the export is tested with; it compares every graph with torch, whatever the family.
_EXPORTED = ("llama", "qwen2", "qwen3", "gpt2", "bert", "vit")
# Sub-layers that a suggestion names one by one.
_NAMED = 3


@dataclass(frozen=True)
class Rule:
    """What a runtime makes of one thing in a stock result; fields as in `runtimes.yaml`."""

    when: str
    loads: bool | None
    classes: tuple[str, ...] = ()
    why: str = ""
    change: str = ""
    source: str = ""


@dataclass(frozen=True)
class Runtime:
    """A runtime with model code of its own; fields as in `runtimes.yaml`."""

    title: str
    classes: tuple[str, ...]
    source: str
    unlisted: bool | None
    rules: tuple[Rule, ...]
    quantised_rows: int = 1


@dataclass(frozen=True)
class Place:
    """Whether a result loads somewhere.

    Args:
        title: of the runtime.
        loads: None where that is not known.
        how: how it loads, or why not, or what is not known.
        change: the smallest change that would make it load, "" where none is known.
        source: where the rule was read, "" where prunekit itself checks it.
    """

    title: str
    loads: bool | None
    how: str
    change: str = ""
    source: str = ""

    def __str__(self) -> str:
        state = {True: "yes", False: "no", None: "not known"}[self.loads]
        parts = [self.how, self.change and f"to make it load: {self.change}"]
        said = "; ".join(part for part in parts if part)
        return f"{state}: {said}" + (f" ({self.source})" if self.source else "")


@cache
def runtimes() -> Mapping[str, Runtime]:
    """Runtimes with model code of their own, by the name that a recipe's `require` uses."""
    import yaml

    data: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))
    found = {}
    for name, entry in data.items():
        rules = tuple(Rule(**{**rule, "classes": tuple(rule.get("classes", ()))}) for rule in entry["rules"])
        found[name] = Runtime(**{**entry, "classes": tuple(entry["classes"]), "rules": rules})
    return found


def loads(view: ModelView, plan: Plan, layout: Layout) -> dict[str, str]:
    """Where a result loads: each text begins with `yes`, `no` or `not known`.

    What is said of transformers and ONNX Runtime is what `prunekit verify` and the export check; what prunekit writes
    for llama.cpp and onnxruntime-genai was run with them; the rest was read in the runtimes' sources.
    """
    return {place.title: str(place) for place in places(view, plan, layout).values()}


def places(view: ModelView, plan: Plan, layout: Layout) -> dict[str, Place]:
    """The same by the names that a recipe's `require` uses.

    Args:
        view: the model before the cut.
        plan: the cuts.
        layout: of the result.
    """
    auto = auto_class(view.config.get("architectures") or ())
    differs = layout.kind == "heterogeneous"
    change = _toward_stock(view, plan) if differs else ""
    found = {}
    if differs:
        found["transformers"] = Place("transformers", False, layout.reason or "its own class was asked for", change)
        remote = f"{auto} with trust_remote_code=True, by the file in the folder; transformers 5.17 or later"
    else:
        found["transformers"] = Place("transformers", True, f"{auto}, no custom code")
        remote = "no code in the folder is needed"
    own = f"{auto} after `import prunekit`" if differs else auto
    found["prunekit"] = Place("transformers and prunekit", True, own)
    found["remote_code"] = Place("remote code", True, remote)
    for name, runtime in runtimes().items():
        place = _decilm_place(view, plan, runtime, change) if differs else _stock_place(view, plan, runtime)
        found[name] = place if name != "llama_cpp" else _gguf_place(view, plan, place)
    found["onnxruntime"] = _onnx(view)
    found["onnxruntime_genai"] = _genai(view, plan, found["onnxruntime"])
    return found


def _decilm_place(view: ModelView, plan: Plan, runtime: Runtime, change: str) -> Place:
    """What a runtime makes of a heterogeneous result, which it may read as DeciLM."""
    why = f"blocks differ, and it has no class for `prunekit_{view.model_type}`"
    if view.model_type not in DECILM_FAMILIES:
        return Place(runtime.title, False, why, change)
    try:
        view.require_plain("DeciLM")
        block_configs(view, plan)
    except PlanError as error:
        return Place(runtime.title, False, f"{why}; nor as DeciLM: {error.what}", change)
    note, _, source = decilm_notes(view, plan)[runtime.title].rpartition(" (")
    if note.startswith("no"):
        return Place(runtime.title, False, f"{why}; nor as DeciLM{note.removeprefix('no')}", change)
    how = "through `prunekit export --format deci`" + note.removeprefix("yes")
    return Place(runtime.title, True, how, source=source.removesuffix(")"))


def _gguf_place(view: ModelView, plan: Plan, other: Place) -> Place:
    """Whether prunekit can write a result for llama.cpp, otherwise what its own converter makes of it."""
    try:
        layout = gguf_layout(view, plan)
    except PlanError as error:
        if other.loads is False and view.model_type in GRAPHS and not other.source:
            return replace(other, how=f"{other.how}; {error.why}")
        return other
    how = f"through `prunekit export --format gguf`, as its `{layout.graph.name}`"
    how += _rows_note(view, plan, runtimes()["llama_cpp"].quantised_rows)
    return Place(other.title, True, how, source=RUN_WITH)


def _onnx(view: ModelView) -> Place:
    if view.section:
        return Place("ONNX Runtime", False, "models that see are not exported")
    if view.arch.stacks:
        return Place("ONNX Runtime", False, "models with an encoder and a decoder are not exported")
    if view.model_type not in _EXPORTED:
        return Place("ONNX Runtime", None, f"`prunekit export` is not tested with `{view.model_type}`")
    return Place("ONNX Runtime", True, "through `prunekit export`")


def _genai(view: ModelView, plan: Plan, onnx: Place) -> Place:
    title = "onnxruntime-genai"
    if not view.arch.decoder:
        return Place(title, False, "it writes text, which this model does not")
    if all(s.kind != "attention" for s in _left(view, plan)):
        return Place(title, False, "no attention is left, and it counts tokens by the KV cache")
    if onnx.loads is not True:
        return Place(title, onnx.loads, onnx.how)
    return Place(title, True, "through `prunekit export --format genai`", source="run with onnxruntime-genai 0.18.0")


def _stock_place(view: ModelView, plan: Plan, runtime: Runtime) -> Place:
    """What a runtime makes of a stock or repacked result: the worst that one of its rules says."""
    names = view.config.get("architectures") or ()
    name = str(names[0]).removeprefix(_CLASS_PREFIX) if names else ""
    if name not in runtime.classes:
        # The language model inside a model that sees may be taken by a class of its own.
        state = None if view.section else runtime.unlisted
        has = "it has no class" if state is False else "whether it has a class"
        return Place(runtime.title, state, f"{has} for `{name or view.model_type}`", source=runtime.source)
    hits: dict[str, Rule] = {}
    changed = changed_kinds(view, plan)
    for rule in runtime.rules:
        if (not rule.classes or name in rule.classes) and _applies(rule.when, view, changed):
            hits.setdefault(rule.when, rule)
    for state in (False, None):
        worst = next((rule for rule in hits.values() if rule.loads is state), None)
        if worst is not None:
            return Place(runtime.title, state, worst.why, worst.change, worst.source or runtime.source)
    sources = dict.fromkeys([runtime.source, *(rule.source for rule in hits.values())])
    how = "where the dense model does: class and tensor names are its own"
    how += _rows_note(view, plan, runtime.quantised_rows)
    return Place(runtime.title, True, how, source=", ".join(sources))


def _applies(when: str, view: ModelView, changed: frozenset[str]) -> bool:
    word, _, key = when.partition(" ")
    if word == "with":
        return bool(view.text.get(key))
    return key not in view.config if word == "without" else word in changed


def changed_kinds(view: ModelView, plan: Plan) -> frozenset[str]:
    """Which of `heads`, `neurons` and `experts` a plan makes fewer; heads only where they leave the hidden width."""
    found: set[str] = set()
    for sublayer in _left(view, plan):
        widths = kept_widths(sublayer, plan)
        if sublayer.role == "attention":
            cut = HIDDEN in plan.keep or any(widths[axis] != sublayer.widths[axis] for axis in ("kv", "rep"))
            # The dense model itself may have heads that do not make up the hidden width.
            if cut and widths["kv"] * widths["rep"] * widths["hd"] != kept_hidden(view, plan):
                found.add("heads")
        else:
            names = {"ffn": "neurons", "experts": "experts"}
            found |= {names[axis] for axis, size in widths.items() if size != sublayer.widths[axis]}
    return frozenset(found)


def _rows_note(view: ModelView, plan: Plan, rows: int) -> str:
    """What quantisation makes of an FFN where a plan leaves no multiple, of a model that had one; "" for none."""
    for sublayer in _left(view, plan):
        if sublayer.kind == "ffn" and sublayer.widths["ffn"] % rows == 0:
            kept = kept_widths(sublayer, plan)["ffn"]
            if kept % rows:
                return f"; its k-quants store rows in multiples of {rows}, FFNs of {kept} in a larger type"
    return ""


def _left(view: ModelView, plan: Plan) -> list[SubLayer]:
    return [sublayer for sublayer in view.sublayers if sublayer.address not in plan.drop]


def _toward_stock(view: ModelView, plan: Plan) -> str:
    """The smallest change after which a heterogeneous result would be a stock one, "" where none is found."""
    drop = Plan.make(view, plan.drop)
    if is_stock(view, drop):
        before = {(*s.widths.items(),) for s in _left(view, plan)}
        if len({(*kept_widths(s, plan).items(),) for s in _left(view, plan)}) > len(before):
            return "leave the same widths in every block, as `within: group` does"
        return "leave the heads whole" if "heads" in changed_kinds(view, plan) else "leave `layout` at auto"
    ways = [*([] if view.arch.stacks else [_to_turns(view, plan)]), _whole_blocks(view, plan)]
    for extra in sorted(ways, key=len):
        more = {*plan.drop, *extra}
        if len(more) < len(view.sublayers) and is_stock(view, Plan.make(view, more)):
            if len(extra) <= _NAMED:
                return f"remove {' and '.join(extra)} too"
            if view.arch.stacks:
                return f"remove {len(extra)} more sub-layers, or use `remove: blocks`"
            return f"remove {len(extra)} more sub-layers, or use `remove: sublayers` with `keep_alternating: true`"
    return ""


def is_stock(view: ModelView, plan: Plan) -> bool:
    """Whether a plan's result is a stock or a repacked model."""
    try:
        return choose_layout(view, plan).kind != "heterogeneous"
    except PlanError:
        return False


def _to_turns(view: ModelView, plan: Plan) -> Sequence[str]:
    """Fewest sub-layers that must go too so that attention and FFN take turns, attention first."""
    extra, wanted, last = [], "attention", ""
    for sublayer in _left(view, plan):
        if sublayer.kind == wanted:
            wanted, last = ("ffn" if wanted == "attention" else "attention"), sublayer.address
        else:
            extra.append(sublayer.address)
    return [*extra, last] if wanted == "ffn" else extra


def _whole_blocks(view: ModelView, plan: Plan) -> Sequence[str]:
    """What is left of blocks that lose a part."""
    halves = [block for block in view.blocks if any(s.address in plan.drop for s in block.sublayers)]
    return [s.address for block in halves for s in block.sublayers if s.address not in plan.drop]
