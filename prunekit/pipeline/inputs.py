"""What a recipe's data is for a given model: windows of text, sentences or images."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prunekit.core.errors import UsageError
from prunekit.core.recipe_model import DEVICES, REGISTRIES
from prunekit.modeling.load import load_tokenizer
from prunekit.structure.parts import HIDDEN

if TYPE_CHECKING:
    from torch import Tensor

    from prunekit.core.recipe_evaluate import Embedding
    from prunekit.core.recipe_model import Calibrate, Recipe
    from prunekit.core.recipe_select import Select
    from prunekit.structure.view import ModelView

Reads = Literal["text", "sentences", "images", "seq2seq"]


def reads(view: ModelView) -> Reads:
    """What a model takes: running text (decoders), sentences (text encoders), images, or `seq2seq` with two stacks."""
    if view.arch.stacks:
        return "seq2seq"
    if view.arch.decoder:
        return "text"
    return "images" if "image_size" in view.config else "sentences"


def require_one_stack(view: ModelView, what: str, hint: str = "leave it out") -> None:
    """Fails where a model with an encoder and a decoder would be run on data.

    Args:
        view: the model.
        what: runs it, as the error says.
        hint: what to do instead.
    Raises:
        UsageError: if it has several stacks.
    """
    if view.arch.stacks:
        why = "it has an encoder and a decoder, and data is made for models with one stack of blocks"
        raise UsageError(f"{what} cannot run `{view.model_type}`", why=why, hint=hint)


def check_methods(view: ModelView, recipe: Recipe) -> None:
    """Fails where a step's method cannot choose from a model.

    Raises:
        UsageError: for a method or a budget that runs a model with an encoder and a decoder.
    """
    for step in recipe.steps:
        method = REGISTRIES[step.by.role].get(step.by.name)
        if step.by.role == "search" or method.needs:
            hint = "use a score that needs no data: gardener, magnitude, random or last_k"
            require_one_stack(view, f"`{step.by.name}`", hint)
        if step.budget.latency_ms is not None or step.budget.of == "latency_ms":
            require_one_stack(view, "a latency budget", "use `of: params` or `of: flops`")


def model_batch(view: ModelView, tokenizer: Any, data: Calibrate | Embedding, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a model by name, sequences first.

    Raises:
        UsageError: when the data does not fit the model.
    """
    from prunekit.calibrate.batches import image_batch, sentence_batch, token_batch

    kind = reads(view)
    if kind == "images":
        size, channels = view.config["image_size"], view.config.get("num_channels", 3)
        if not isinstance(size, int):
            raise UsageError("only square images are known here", why=f"`image_size` is {size}")
        return image_batch(data.data, data.sequences, channels, size, seed, view.config.get("num_frames"))
    if kind == "sentences":
        return sentence_batch(tokenizer, data.data, data.sequences, data.length_tokens, seed)
    return {"input_ids": token_batch(tokenizer, data.data, data.sequences, data.length_tokens, seed)}


def selected_batch(
    view: ModelView, tokenizer: Any, recipe: Recipe, select: Select, talk: Callable[[str], None]
) -> Mapping[str, Tensor]:
    """Calibration inputs that a data-pruning metric keeps, scored by the model before any cut.

    Args:
        talk: told which sequences stay, and why.
    """
    from prunekit.datasets.calibration import pool_size
    from prunekit.modeling.load import load_model

    calibrate, device = recipe.calibrate, device_of(recipe)
    more = calibrate.model_copy(update={"sequences": pool_size(calibrate.sequences, select)})
    pool = model_batch(view, tokenizer, more, calibrate.seed)
    folder, remote = view.checkpoint.folder, recipe.model.trust_remote_code
    choose = chooser(
        select, lambda: load_model(folder, dtype_of(recipe, view, device), device, remote), calibrate.seed, talk
    )
    return choose(pool, calibrate.sequences)


def chooser(
    select: Select, load_model: Callable[[], Any], seed: int, talk: Callable[[str], None]
) -> Callable[[Mapping[str, Tensor], int], Mapping[str, Tensor]]:
    """What keeps, of the rows of a text, those that a data-pruning metric prefers.

    Args:
        select: metric and rule.
        load_model: gives the model that scores.
        seed: decides among equal scores.
        talk: told which rows stay, and why.
    """
    from prunekit.datasets.calibration import pool_size, selected

    def choose(rows: Mapping[str, Tensor], count: int) -> Mapping[str, Tensor]:
        pool = {name: part[: pool_size(count, select)] for name, part in rows.items()}
        kept, why = selected(pool, count, select, load_model(), seed)
        talk(f"{count} of {len(next(iter(pool.values())))} sequences stay, the {why}")
        return kept

    return choose


def tokenizer_for(view: ModelView, recipe: Recipe) -> Any:
    """Tokenizer of a model that reads text; None for one that reads images.

    Raises:
        UsageError: where the folder holds none.
    """
    if reads(view) == "images":
        return None
    tokenizer = load_tokenizer(view.checkpoint.folder, recipe.model.trust_remote_code)
    if tokenizer is None:
        raise UsageError(
            f"`{recipe.model.source}` has no tokenizer",
            why="methods that run the model, and measurements of quality, need text as tokens",
            hint="put the tokenizer's files into the folder",
        )
    return tokenizer


def check_evaluation(view: ModelView, recipe: Recipe) -> None:
    """Fails before any work where the recipe asks for what the model cannot be measured by.

    Raises:
        UsageError: for perplexity or a sample of an encoder, or sentence embeddings of a decoder.
    """
    kind, asked = reads(view), recipe.evaluate
    for name in type(asked).model_fields:
        if getattr(asked, name) is not None:
            require_one_stack(view, f"`evaluate.{name}`")
    _check_width(recipe, kind)
    writes = kind == "text" and view.head is not None
    for name, part in (("perplexity", asked.perplexity), ("kl", asked.kl), ("sample", asked.sample)):
        if part is not None and not writes:
            hint = "use `evaluate.embedding`" if kind != "text" else ""
            raise UsageError(f"`evaluate.{name}` needs a model that writes text", hint=hint)
    data = asked.embedding.data if asked.embedding is not None and kind == "images" else "noise"
    if data != "noise" and Path(data).suffix != ".safetensors":
        raise UsageError(
            f"`evaluate.embedding.data: {data}` is text",
            why="the model reads images",
            hint="give `noise`, or a .safetensors file with `pixel_values`",
        )


def removes_hidden(recipe: Recipe) -> bool:
    """Whether a recipe makes the residual stream narrower."""
    return any(step.remove == HIDDEN for step in recipe.steps) or HIDDEN in (
        recipe.learn.remove if recipe.learn else ()
    )


def _check_width(recipe: Recipe, kind: Reads) -> None:
    """Fails where hidden states of two widths would be compared.

    Raises:
        UsageError: naming the section.
    """
    if not removes_hidden(recipe):
        return
    heal = recipe.heal
    distils = heal is not None and heal.method == "distill" and (kind == "sentences" or heal.knobs.get("hidden"))
    wrong = {
        "evaluate.embedding": (
            recipe.evaluate.embedding is not None,
            "measure by `evaluate.tasks`, such as `similarity`",
        ),
        "repair": (recipe.repair is not None, "leave it out"),
        "heal": (distils, "learn from the text alone, or from logits, where the model writes text"),
    }
    for name, (asked, hint) in wrong.items():
        if asked:
            why = "it compares hidden states of the dense model with narrower ones"
            raise UsageError(f"`{name}` does not go with the removal of hidden channels", why=why, hint=hint)


def device_of(recipe: Recipe) -> str:
    """The device that a recipe means.

    Raises:
        UsageError: if this machine has no such device.
    """
    return device_named(recipe.model.device)


def device_named(wanted: str) -> str:
    """The device that a name means: `auto` is the first GPU, or the CPU without one.

    Raises:
        UsageError: if there is no such device, or the name is none.
    """
    import torch

    if not re.fullmatch(DEVICES, wanted):
        raise UsageError(f"`{wanted}` is no device", hint="allowed: auto, cpu, mps, cuda, cuda:1")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda"):
        number = int(wanted.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            why = f"torch sees {torch.cuda.device_count()} CUDA devices"
            raise UsageError(f"there is no device `{wanted}`", why=why, hint="use `auto` or `cpu`")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UsageError("there is no device `mps`", hint="use `auto` or `cpu`")
    return wanted


def offloaded(recipe: Recipe, view: ModelView, device: str, dtype: str) -> bool:
    """Whether weights stay in their files while methods calibrate: as asked, or where they do not fit into memory."""
    from prunekit.modeling.offload import fits
    from prunekit.plan.cost import cost

    if device != "cpu" or recipe.model.offload != "auto":
        return device == "cpu" and recipe.model.offload == "always"
    return not fits(cost(view).params * (4 if dtype == "float32" else 2))


def dtype_of(recipe: Recipe, view: ModelView, device: str) -> str:
    """Type to compute in: as asked; else float32 on a CPU, and on a GPU the type that most weights have."""
    if recipe.model.dtype is not None:
        return recipe.model.dtype
    if device == "cpu":
        return "float32"
    held: dict[str, int] = {}
    for info in view.checkpoint.tensors.values():
        held[info.dtype] = held.get(info.dtype, 0) + info.n_bytes
    most = max(held, key=lambda code: held[code])
    return {"BF16": "bfloat16", "F16": "float16"}.get(most, "float32")
