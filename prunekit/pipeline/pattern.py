"""The pattern of a recipe's `runtime` key: checked against the model, written into the result, used in measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import UsageError
from prunekit.core.files import write_json
from prunekit.pipeline.inputs import reads, require_one_stack

if TYPE_CHECKING:
    from prunekit.core.recipe_model import Recipe
    from prunekit.pipeline.choose import Made
    from prunekit.plan.layout import Layout
    from prunekit.structure.view import ModelView

AT = "runtime.attention"


def check_pattern(view: ModelView, recipe: Recipe) -> None:
    """Fails before any work where the pattern cannot be the model's.

    Raises:
        UsageError: for a model of several parts or stacks or with softcapped scores, a graph of a model with sliding
            windows, a causal pattern on an encoder or the reverse, layers that it has not, or a text to measure on that
            is longer than the pattern is for.
    """
    if recipe.runtime is None:
        return
    require_one_stack(view, "`runtime`")
    from prunekit.runtime.attention.policy import policy

    asked = recipe.runtime.attention
    pattern = policy({"pattern": asked.pattern, **asked.options}).pattern
    if view.section:
        why = f"a pattern would be for all of `{view.model_type}`, its `{view.section}` is one part"
        raise UsageError("`runtime` is for models of one part", why=why, at="runtime")
    if view.text.get("attn_logit_softcapping") is not None:
        why = f"`{view.model_type}` caps the scores of its attention, which a pattern would leave out"
        raise UsageError("`runtime` does not go with a cap on scores", why=why, at="runtime")
    graph = next((kind for kind in recipe.export.formats if kind in ("onnx", "genai")), None)
    if graph is not None and _has_windows(view.text):
        why = f"`{view.model_type}` has windows of its own, under which a graph does not see where a text begins"
        raise UsageError(f"`{graph}` cannot hold a pattern of this model", why=why, hint="leave one out", at="runtime")
    causal = reads(view) == "text"
    if pattern.causal != causal:
        kinds = ("bidirectional", "causal")
        raise UsageError(
            f"`{asked.pattern}` is a {kinds[pattern.causal]} pattern and the model's attention {kinds[causal]}",
            hint="set the pattern's `causal` option to what the model is, or choose a pattern that has one",
            at=AT,
        )
    wrong = [layer for layer in asked.layers or () if not 0 <= layer < len(view.blocks)]
    if wrong:
        why = f"the model has {len(view.blocks)} blocks, numbered from 0"
        raise UsageError(f"there is no block {wrong[0]}", why=why, at=f"{AT}.layers")
    longest = asked.length_tokens
    for name in ("perplexity", "kl"):
        part = getattr(recipe.evaluate, name)
        if longest is not None and part is not None and part.length_tokens > longest:
            why = f"`length_tokens` of the pattern is {longest:,}, of `evaluate.{name}` {part.length_tokens:,}"
            raise UsageError(f"`evaluate.{name}` reads more than the pattern is for", why=why, at=AT)


def _has_windows(text: Mapping[str, Any]) -> bool:
    """Whether a model's own mask is more than causality in some of its layers."""
    types = text.get("layer_types")
    if types is not None:
        return any(kind.startswith(("sliding", "chunked")) for kind in types)
    return text.get("sliding_window") is not None and text.get("use_sliding_window") is not False


def write_pattern(recipe: Recipe, made: Made, folder: Path) -> None:
    """Writes the pattern into the `config.json` of the result, layers by the numbers they have there.

    Stock transformers passes the section over; `attn_implementation="prunekit"` reads it.
    """
    if recipe.runtime is None:
        return
    from transformers import AutoConfig

    from prunekit.runtime.attention.policy import model_facts, policy

    asked = recipe.runtime.attention
    section = policy({"pattern": asked.pattern, **asked.options}).section()
    if asked.layers is not None:
        section["layers"] = _moved(made.view, made.layout, asked.layers)
    if asked.length_tokens is not None:
        section["length_tokens"] = asked.length_tokens
    trusted = recipe.model.trust_remote_code
    section["made_for"] = model_facts(AutoConfig.from_pretrained(folder, trust_remote_code=trusted))
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    others: Mapping[str, Any] = config.get("prunekit") or {}
    config["prunekit"] = {**others, "runtime": {**(others.get("runtime") or {}), "attention": section}}
    write_json(path, config)


def under_pattern(model: Any) -> None:
    """Lets a loaded model read as the pattern in its configuration says."""
    from prunekit.runtime import attach
    from prunekit.runtime.attention.policy import policy_of

    attach(model, policy_of(model.config).section())


def notes_of(recipe: Recipe) -> list[str]:
    """What the result reads, in sentences."""
    if recipe.runtime is None:
        return []
    asked = recipe.runtime.attention.model_dump()
    options = ", ".join(f"{key} {value}" for key, value in asked.items() if key != "pattern")
    pattern = f"`{asked['pattern']}`" + (f" ({options})" if options else "")
    return [
        f"Figures after the cut are those under the pattern {pattern}, which its configuration holds. It is on with "
        '`import prunekit` and `attn_implementation="prunekit"`; loaded otherwise the model reads every key.'
    ]


def _moved(view: ModelView, layout: Layout, layers: tuple[int, ...]) -> list[int]:
    """Numbers that attentions of these blocks go by in the result; those that were removed have none."""
    attentions = [attention for attention, _ in layout.pairs]
    slots: list[int | None] = list(range(len(attentions)))
    if layout.kind == "heterogeneous":
        from prunekit.modeling.modeling_prunekit import cache_slots

        types = view.text.get("layer_types") or [""] * len(attentions)
        kept = [attention is not None for attention in attentions]
        if any(kept) and not all(kept):
            _, slots = cache_slots(types, kept)
    found = zip(attentions, slots, strict=True)
    return [slot for attention, slot in found if attention in layers and slot is not None]
