"""What llama.cpp's graphs can compute: which of its architectures holds what a plan leaves, or why none does.

Read in llama.cpp's sources as of llama-cpp-python 0.3.36, and run with that package in the tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import PlanError
from prunekit.plan.cost import kept_hidden, kept_widths
from prunekit.plan.layout import Pair
from prunekit.plan.plan import Plan

if TYPE_CHECKING:
    from prunekit.structure.parts import SubLayer
    from prunekit.structure.view import ModelView

RUN_WITH = "run with llama-cpp-python 0.3.36"
HINT = "leave `gguf` out, or cut so that the rule is kept"
_ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Graph:
    """An architecture of llama.cpp.

    Args:
        name: as `general.architecture` says it.
        differs: whether widths are read for each block.
        biased: tensors that may have a bias, by their names after the block's number.
        tied_heads: whether the widths of all heads must make up the hidden width.
        pairs: whether rotary positions turn neighbouring numbers of a head, and not its halves.
        activations: of FFNs, by transformers' names.
    """

    name: str
    differs: bool
    biased: tuple[str, ...]
    tied_heads: bool
    pairs: bool
    activations: tuple[str, ...] = ("silu", "swish")


_QKV = tuple(f"self_attn.{name}_proj" for name in "qkv")
_ALL = (*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_DECI = Graph("deci", True, _ALL, False, True)
_LLAMA = (Graph("llama", False, _ALL, False, True), _DECI)
GRAPHS: dict[str, tuple[Graph, ...]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": (Graph("qwen2", False, _QKV, True, False), _DECI),
    "qwen3": (Graph("qwen3", False, _QKV, False, False),),
    "gpt2": (
        Graph(
            "gpt2",
            False,
            ("ln_1", "ln_2", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
            True,
            False,
            ("gelu_new", "gelu_pytorch_tanh"),
        ),
    ),
}


@dataclass(frozen=True)
class GgufLayout:
    """How a result is laid out in a GGUF file.

    Args:
        graph: the architecture.
        pairs: for each block of the file the model's block of its attention and that of its FFN, None where it has
            none.
        padding: sub-layers of zeros that the graph needs and that add nothing, as `blocks.3.ffn` of the file.
    """

    graph: Graph
    pairs: tuple[Pair, ...]
    padding: tuple[str, ...]


def gguf_layout(view: ModelView, plan: Plan) -> GgufLayout:
    """The architecture of llama.cpp that computes what a plan leaves.

    Raises:
        PlanError: naming the rule that the family or the plan breaks.
    """
    require_family(view)
    reasons = []
    for graph in GRAPHS[view.model_type]:
        reason = _graph_reason(view, plan, graph)
        if not reason:
            pairs = tuple(paired(view, plan))
            return GgufLayout(graph, pairs, _padding(pairs) if graph.differs else ())
        reasons.append(f"llama.cpp's `{graph.name}` graph: {reason}")
    what = f"llama.cpp cannot compute what is left of this `{view.model_type}`"
    raise PlanError(what, why="; ".join(reasons), hint=HINT)


def require_family(view: ModelView) -> None:
    """Makes sure that llama.cpp may compute a model, whatever is removed.

    Raises:
        PlanError: naming the rule that it breaks.
    """
    family = f"`{view.model_type}`"
    view.require_plain("GGUF")
    if view.section or view.model_type not in GRAPHS:
        raise PlanError(f"{family} is not written as GGUF", why=f"prunekit writes {', '.join(GRAPHS)}", hint=HINT)
    reason = _config_reason(view)
    if reason:
        raise PlanError(f"this {family} cannot be a GGUF file", why=reason, hint=HINT)


def paired(view: ModelView, plan: Plan) -> Iterator[Pair]:
    """What is left as blocks: each attention with the FFN right after it, what has no partner alone."""
    waiting: int | None = None
    for sublayer in _left(view, plan):
        if sublayer.kind == "ffn":
            yield waiting, sublayer.block
            waiting = None
            continue
        if waiting is not None:
            yield waiting, None
        waiting = sublayer.block
    if waiting is not None:
        yield waiting, None


def _left(view: ModelView, plan: Plan) -> list[SubLayer]:
    return [sublayer for sublayer in view.sublayers if sublayer.address not in plan.drop]


def _padding(pairs: tuple[Pair, ...]) -> tuple[str, ...]:
    """Where `deci` needs a sub-layer of zeros.

    It takes the width of heads from block 0, and loses what an attention without an FFN puts out.
    """
    first = ("blocks.0.attention",) if pairs[0][0] is None else ()
    return (*first, *(f"blocks.{i}.ffn" for i, (_, ffn) in enumerate(pairs) if ffn is None))


def rope_of(text: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions of a configuration, as transformers 5 says them; `rope_type` is always there."""
    found = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    found.setdefault("rope_type", found.pop("type", None) or "default")
    if text.get("rope_theta") is not None:
        found.setdefault("rope_theta", text["rope_theta"])
    return found


def _config_reason(view: ModelView) -> str:
    """What in the configuration no graph computes, "" where all is well."""
    text, classes = view.text, view.config.get("architectures") or [""]
    if not classes[0].endswith(("ForCausalLM", "LMHeadModel")):
        return f"`{classes[0]}` is no language model with a head"
    window = text.get("sliding_window") if text.get("use_sliding_window", view.model_type == "mistral") else None
    if window and window < text.get("max_position_embeddings", 0):
        return f"its graphs know no sliding window, and attention sees {window} tokens"
    rope = rope_of(text)
    if rope["rope_type"] not in _ROPE_TYPES:
        return f"rotary positions of type `{rope['rope_type']}` are not written, {', '.join(_ROPE_TYPES)} are"
    if (rope.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1.0) != 1.0:
        return "its graphs turn whole heads, and this model a part of each"
    for key in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if text.get(key):
            return f"its graph knows no `{key}`"
    return "" if text.get("scale_attn_weights", True) else "its graph scales attention weights"


def _graph_reason(view: ModelView, plan: Plan, graph: Graph) -> str:
    """What a graph does not compute, "" where all is well."""
    if rope_of(view.text)["rope_type"] == "llama3" and not graph.pairs:
        return "rotary positions of Llama 3.1 are not computed"
    activation = view.text.get("hidden_act") or view.text.get("activation_function") or graph.activations[0]
    if activation not in graph.activations:
        return f"FFNs are `{graph.activations[0]}`, not `{activation}`"
    left = _left(view, plan)
    for sublayer in left:
        for ref in sublayer.tensors:
            _, rest = view.arch.split(ref.name) or (0, "")
            if rest.endswith(".bias") and rest.removesuffix(".bias") not in graph.biased:
                return f"`{rest.removesuffix('.bias')}` has no bias"
            if graph.differs and rest.endswith(("q_norm.weight", "k_norm.weight")):
                return "queries and keys have no norm"
    attention = next((s for s in left if s.kind == "attention"), None)
    if attention is None:
        return "a model without attention does not run"
    widths = [kept_widths(sublayer, plan) for sublayer in left]
    if not graph.differs:
        kinds = [sublayer.kind for sublayer in left]
        if kinds != ["attention", "ffn"] * (len(kinds) // 2):
            return "every block has an attention and an FFN"
        alike = {(s.kind, *w.values()) for s, w in zip(left, widths, strict=True)}
        if len(alike) > 2:
            return "all blocks have the same widths"
    heads = {w["kv"] * w["rep"] * w["hd"] for s, w in zip(left, widths, strict=True) if s.kind == "attention"}
    hidden = kept_hidden(view, plan)
    if graph.tied_heads and heads != {hidden}:
        return f"heads make up the hidden width of {hidden}, these {', '.join(map(str, sorted(heads)))}"
    return ""
