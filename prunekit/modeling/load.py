"""Loads a checkpoint folder into its class, and lets nothing be missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import CheckpointError
from prunekit.modeling.families import PREFIX
from prunekit.modeling.offload import options as disk_options
from prunekit.modeling.quiet import quiet
from prunekit.structure.architecture import architectures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Buffers that older versions of transformers saved beside the weights; the models make them by themselves.
_BUFFERS = (
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".rotary_emb.inv_freq",
    "embeddings.position_ids",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)


def load_model(
    folder: Path,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    offload: bool = False,
) -> PreTrainedModel:
    """Model of a checkpoint folder in eval mode, stock or heterogeneous, with `sdpa` attention where it has that.

    The class is the one its configuration names under `architectures`; the base model where it names none.

    Args:
        folder: with `config.json` and safetensors files; pickled weights are never read.
        dtype: of the weights in memory, such as `bfloat16`; `auto` keeps the file's.
        device: where to, such as `cuda`.
        trust_remote_code: whether modeling code inside the folder may run where no other class is known.
        offload: leave weights in the files and read each when it is needed; on the CPU alone.
    Raises:
        CheckpointError: if the class is not known, or a tensor is missing, unexpected or of another shape.
    """
    folder = Path(folder)
    config = _config(folder)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"`{folder}` holds no safetensors files", why="pickled weights are never read")
    with quiet():
        cls = _model_class(folder, config, trust_remote_code)
        try:
            model, info = _read(cls, folder, dtype, trust_remote_code, offload)
        except Exception as error:
            raise CheckpointError(f"`{folder}` cannot be loaded", why=_first_line(error)) from error
        _require_all(folder, info, type(model).__name__)
        loaded: PreTrainedModel = (model if offload else model.to(device)).eval()
    return loaded


def to_float64(model: PreTrainedModel) -> PreTrainedModel:
    """A model moved to the CPU in float64, experts one after the other since their grouped products know no float64."""
    import torch

    if any(hasattr(module, "experts") for module in model.modules()):
        model.set_experts_implementation("eager")
    return model.to("cpu", torch.float64)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Tokenizer of a checkpoint folder, None where it has none.

    Args:
        folder: checkpoint folder.
        trust_remote_code: whether code inside the folder may run.
    Raises:
        CheckpointError: if there are files of a tokenizer and they cannot be read.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    with quiet():
        try:
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=trust_remote_code
            )
        except Exception as error:
            raise CheckpointError(f"the tokenizer in `{folder}` cannot be loaded", why=_first_line(error)) from error
    return tokenizer


def _read(cls: Any, folder: Path, dtype: str, trust_remote_code: bool, offload: bool) -> tuple[Any, dict[str, Any]]:
    """The model, and what transformers noticed about its tensors."""
    import torch

    # The grouped products that transformers runs experts by know no float64.
    options: dict[str, Any] = {"experts_implementation": "eager"} if dtype == "float64" else {}
    options |= disk_options() if offload else {}
    model, info = cls.from_pretrained(
        folder,
        dtype=dtype if dtype == "auto" else getattr(torch, dtype),
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        **options,
    )
    return model, info


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"`{folder}` has no readable `config.json`", why=_first_line(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"`{folder / 'config.json'}` is no mapping")
    return config


def _model_class(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    """Class with `from_pretrained`."""
    import transformers

    arch = architectures().get(str(config.get("model_type", "")).removeprefix("prunekit_"))
    named = config.get("architectures") or ()
    if arch is not None and not arch.decoder:
        named = arch.classes(config, Checkpoint.open(folder).tensors)
    name = next(iter(named), None)
    source: Any = transformers
    if str(config.get("model_type", "")).startswith("prunekit_"):
        from prunekit.modeling import modeling_prunekit

        source = modeling_prunekit
        name = name if name is None or name.startswith(PREFIX) else f"{PREFIX}{name}"
    if name is None:
        return transformers.AutoModel
    cls = getattr(source, name, None)
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return cls
    auto = [key for key, place in (config.get("auto_map") or {}).items() if str(place).endswith(f".{name}")]
    if auto and trust_remote_code:
        return getattr(transformers, auto[0])
    raise CheckpointError(
        f"no class `{name}` is known",
        why=f"transformers {transformers.__version__} has none"
        + (", and code inside the folder is not run unasked" if auto else ""),
        hint="pass `trust_remote_code=True` if you trust that code" if auto else "install a newer transformers",
        at=str(folder / "config.json"),
    )


def _require_all(folder: Path, info: dict[str, Any], cls: str) -> None:
    """Turns what transformers only reports into an error that names the first tensor."""
    for kind in ("missing", "mismatched", "unexpected"):
        keys = sorted(key if isinstance(key, str) else key[0] for key in info.get(f"{kind}_keys") or ())
        keys = [key for key in keys if kind != "unexpected" or not key.endswith(_BUFFERS)]
        if keys:
            others = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            what = {"missing": "lacks", "mismatched": "has another shape for", "unexpected": "has no place for"}[kind]
            subject = f"`{cls}`" if kind == "unexpected" else f"`{folder}`"
            raise CheckpointError(f"{subject} {what} `{keys[0]}`{others}", why=f"`{cls}` and the files must agree")
    for message in info.get("error_msgs") or ():
        raise CheckpointError(f"`{folder}` cannot be loaded", why=str(message).strip().splitlines()[0])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__
