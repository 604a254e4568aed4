"""Which families have heterogeneous classes, and what their configuration says about them; knows no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunekit.core.errors import PlanError

# Parts of file and class names, as `modeling_prunekit.py` has them.
MODULE = "modeling_prunekit"
PREFIX = "Prunekit"
_DECODER_HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
_TEXT_HEADS = ("ForSequenceClassification", "ForTokenClassification")
# Stock model type: name in class names, heads.
_FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("Llama", _DECODER_HEADS),
    "mistral": ("Mistral", _DECODER_HEADS),
    "qwen2": ("Qwen2", _DECODER_HEADS),
    "qwen3": ("Qwen3", _DECODER_HEADS),
    "gpt2": ("GPT2", ("LMHeadModel", *_TEXT_HEADS)),
    "bert": ("Bert", ("ForPreTraining", "ForMaskedLM", "ForQuestionAnswering", *_TEXT_HEADS)),
    "vit": ("ViT", ("ForImageClassification",)),
}
HETERO_FAMILIES = tuple(_FAMILIES)


def hetero_model_type(model_type: str) -> str:
    """Model type of a family's heterogeneous models."""
    return f"prunekit_{model_type}"


def hetero_config_class(model_type: str) -> str:
    """Name of a family's heterogeneous configuration class."""
    return f"{PREFIX}{_FAMILIES[model_type][0]}Config"


def hetero_classes(model_type: str) -> dict[str, str]:
    """Heterogeneous model classes of a family, base model first, and the Auto class of each."""
    name, heads = _FAMILIES[model_type]
    return {f"{PREFIX}{name}{head}": _auto_class(head) for head in ("Model", *heads)}


def _auto_class(head: str) -> str:
    if head == "Model":
        return "AutoModel"
    return "AutoModelForCausalLM" if head == "LMHeadModel" else f"AutoModel{head}"


def hetero_config_fields(model_type: str, architectures: Sequence[str] | None) -> dict[str, Any]:
    """What a configuration says so that heterogeneous classes are found.

    Args:
        model_type: of the stock family, such as `llama`.
        architectures: stock classes that the source's configuration names; its base model where it names none.

    Returns:
        `model_type`, `architectures` and `auto_map`, the Auto class of the architecture last.
    Raises:
        PlanError: for a family or an architecture that has no heterogeneous class.
    """
    if model_type not in _FAMILIES:
        known = ", ".join(HETERO_FAMILIES)
        raise PlanError(f"`{model_type}` has no class for blocks that differ", hint=f"families that have: {known}")
    classes = hetero_classes(model_type)
    base = next(iter(classes))
    wanted = f"{PREFIX}{architectures[0]}" if architectures else base
    if wanted not in classes:
        known = ", ".join(name.removeprefix(PREFIX) for name in classes)
        raise PlanError(
            f"`{wanted.removeprefix(PREFIX)}` has no class for blocks that differ",
            hint=f"architectures of `{model_type}` that have: {known}",
        )
    named = {"AutoConfig": hetero_config_class(model_type), "AutoModel": base}
    if wanted != base:
        named[classes[wanted]] = wanted
    return {
        "model_type": hetero_model_type(model_type),
        "architectures": [wanted],
        "auto_map": {auto: f"{MODULE}.{name}" for auto, name in named.items()},
    }
