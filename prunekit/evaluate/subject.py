"""A model under evaluation: opened and checked at once, its weights loaded when a task first needs them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from prunekit.core.errors import CheckpointError, UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress

Kind = Literal["text", "sentences", "images", "seq2seq"]
# What tells people of a kind of model.
KINDS: dict[Kind, str] = {
    "text": "a model that writes text",
    "sentences": "a text encoder",
    "images": "an image encoder",
    "seq2seq": "a model with an encoder and a decoder",
}
GRAPH = "model.onnx"
_WRITERS = ("ForCausalLM", "LMHeadModel")
_POSITIONS = ("max_position_embeddings", "n_positions")


@dataclass
class Subject:
    """A model under evaluation.

    Args:
        name: what tables call it.
        folder: its files, only ever read.
        config: its `config.json`.
        tokenizer: None for image models and folders without one.
        backend: `torch`, or `onnx` for a folder that `prunekit export` wrote.
        device: where tensors are, such as `cpu` or `cuda:1`.
        dtype: of the weights in memory.
        batch_size: rows that tasks run at once.
        trust_remote_code: whether modelling code inside the folder may run.
        attention: section of the sparse runtime that it runs under, such as `{"pattern": "power"}`; None is dense.
        strict: whether a pattern without a kernel for it is an error.
        loaded: the model where it is in memory already.
        choosing: what keeps units chosen for each input, where the folder has predictors and the model was loaded.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    tokenizer: Any = None
    backend: Literal["torch", "onnx"] = "torch"
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 8
    trust_remote_code: bool = False
    attention: Mapping[str, Any] | None = None
    strict: bool = False
    loaded: Any = field(default=None, repr=False)
    choosing: Any = field(default=None, repr=False)

    @property
    def kind(self) -> Kind:
        """What it reads and gives, by its configuration."""
        return kind_of(self.config)

    @property
    def positions(self) -> int | None:
        """Longest text in tokens; None where the configuration does not say."""
        found = next((self.config[name] for name in _POSITIONS if self.config.get(name)), None)
        return found if isinstance(found, int) else None

    @property
    def model(self) -> Any:
        """The model in eval mode, or the ONNX graph that is called as one; loaded on the first use.

        Raises:
            CheckpointError: if it cannot be loaded.
            RuntimePolicyError: if its pattern is for another model, or, if strict, has no kernel.
        """
        if self.loaded is None:
            if self.backend == "onnx":
                from prunekit.evaluate.onnx import OnnxModel

                self.loaded = OnnxModel(self.folder, self.device)
            else:
                from prunekit.modeling.dynamic import dynamic
                from prunekit.modeling.load import load_model

                model = load_model(self.folder, self.dtype, self.device, self.trust_remote_code)
                if self.attention is not None:
                    from prunekit.runtime import attach

                    attach(model, self.attention, strict=self.strict)
                # What is measured is the model that the folder is for.
                self.choosing = dynamic(model, self.folder)
                self.loaded = self.choosing.__enter__()
        return self.loaded

    def release(self) -> None:
        """Lets the weights go."""
        self.loaded = self.choosing = None

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
            text: not empty.
            special: whether the tokenizer adds the special tokens that it adds of its own accord.
        """
        return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def require_positions(self, n_tokens: int, what: str, at: str = "", hint: str = "") -> None:
        """Fails where a text is longer than the model reads.

        Raises:
            UsageError: naming both lengths.
        """
        if self.positions is not None and n_tokens > self.positions:
            raise UsageError(
                f"{what} is longer than `{self.name}` reads",
                why=f"it has {n_tokens:,} tokens, the model {self.positions:,} positions",
                hint=hint,
                at=at,
            )


def kind_of(config: Mapping[str, Any]) -> Kind:
    """What a model reads and gives, by its configuration."""
    names = config.get("architectures") or ()
    if any(str(name).endswith(_WRITERS) for name in names):
        return "text"
    if config.get("is_encoder_decoder"):
        return "seq2seq"
    return "images" if "image_size" in config else "sentences"


def rows_at_once(device: str) -> int:
    """How many rows tasks run at once where nobody says."""
    return 8 if device == "cpu" else 32


def open_subject(
    source: str,
    device: str,
    dtype: str | None,
    batch_size: int,
    progress: Progress = NULL_PROGRESS,
    auto: bool = False,
) -> Subject:
    """A model by folder, ONNX folder, hub id, GGUF file or packaged name; headers and tokenizer are read, no weight.

    A folder whose configuration names a pattern runs under it.

    Args:
        source: as the command line takes it.
        device: where it will run.
        dtype: of its weights in memory; None takes float32 on a CPU and the file's type elsewhere.
        batch_size: rows that tasks run at once.
        progress: of a conversion or a download.
        auto: whether an ONNX folder runs on the CPU where this ONNX Runtime knows no such device.
    Raises:
        CheckpointError: if there is no such model, or its files are damaged.
        UsageError: if ONNX Runtime knows no such device.
    """
    from prunekit.checkpoint.reader import Checkpoint
    from prunekit.checkpoint.sources import resolve
    from prunekit.modeling.load import load_tokenizer
    from prunekit.runtime.attention.policy import section_of

    path = Path(source).expanduser()
    graph = path.parent if path.name == GRAPH else path
    if (graph / GRAPH).is_file() and not any(graph.glob("*.safetensors")):
        return _onnx_subject(graph, device, batch_size, auto)
    resolved = resolve(source, progress=progress)
    checkpoint = Checkpoint.open(resolved.folder)
    taken = dtype or ("float32" if device == "cpu" else "auto")
    subject = Subject(resolved.name, resolved.folder, checkpoint.config, None, "torch", device, taken, batch_size)
    subject.attention = section_of(checkpoint.config.get("prunekit"))
    if subject.kind != "images":
        subject.tokenizer = load_tokenizer(resolved.folder)
    return subject


def _onnx_subject(folder: Path, device: str, batch_size: int, auto: bool) -> Subject:
    from prunekit.export.onnx import require_packages
    from prunekit.export.ort import providers
    from prunekit.modeling.load import load_tokenizer

    require_packages()
    taken = "cpu" if auto and len(providers()) == 1 else device
    providers(taken)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        why = "its configuration says what the graph is"
        raise CheckpointError(f"`{folder}` has no readable `config.json`", why=why) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"`{folder / 'config.json'}` is no mapping")
    resolved = folder.resolve()
    name = f"{resolved.parent.name}/{resolved.name}"
    subject = Subject(name, folder, config, None, "onnx", taken, "float32", batch_size)
    if subject.kind != "images":
        subject.tokenizer = load_tokenizer(folder)
    return subject
