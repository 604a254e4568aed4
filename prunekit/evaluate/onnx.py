"""An exported graph in ONNX Runtime, called as tasks call a torch model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunekit.core.errors import CheckpointError
from prunekit.export._external import external_files
from prunekit.export.ort import GRAPH, OrtDecoder, is_decoder_graph, open_session


class OnnxModel:
    """An exported decoder or encoder with the few names of a torch model that tasks use.

    Tensors go in and come out on the CPU; a decoder's KV cache stays on the session's device.

    Args:
        folder: ONNX folder that `prunekit export` wrote.
        device: `cpu`, `cuda` or `cuda:1`.
    Raises:
        ExportError: if there is no graph, or ONNX Runtime cannot open it there.
        CheckpointError: if its configuration cannot be read.
    """

    # Of the tensors that go in: what ONNX Runtime computes with is its own matter.
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoConfig, GenerationConfig

        session = open_session(folder, device)
        self.session = session
        self._decoder = OrtDecoder(folder, session) if is_decoder_graph(session) else None
        self._inputs = {value.name for value in session.get_inputs()}
        self._output = session.get_outputs()[0].name
        self.ran_on = device if "CUDAExecutionProvider" in session.get_providers() else "cpu"
        self.main_input_name = "pixel_values" if "pixel_values" in self._inputs else "input_ids"
        self.weight_bytes = sum(file.stat().st_size for file in external_files(folder / GRAPH))
        try:
            self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
            has_settings = (folder / "generation_config.json").is_file()
            self.generation_config = (
                GenerationConfig.from_pretrained(folder, local_files_only=True)
                if has_settings
                else GenerationConfig.from_model_config(self.config)
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"`{folder}` has a configuration that cannot be read", why=str(error)) from error

    @property
    def base_model(self) -> OnnxModel:
        """Itself: a graph has no parts."""
        return self

    def can_generate(self) -> bool:
        """Whether it continues text."""
        return self._decoder is not None

    def get_output_embeddings(self) -> OnnxModel | None:
        """Something where it gives logits of the next token; the head is inside the graph."""
        return self if self._decoder is not None else None

    def forward(self, input_ids: Any = None, past_key_values: Any = None) -> SimpleNamespace:
        """The same by another name, whose arguments tell by which name the cache is taken."""
        return self(input_ids=input_ids, past_key_values=past_key_values)

    def __call__(self, **inputs: Any) -> SimpleNamespace:
        """One pass: `logits`, and of decoders `past_key_values`, or `last_hidden_state`, by what the graph gives.

        Args:
            inputs: tensors by name, `past_key_values` from the pass before; `use_cache` and `logits_to_keep` are for
                torch's models and change nothing here.
        """
        if self._decoder is not None:
            return self._step(inputs["input_ids"], inputs.get("attention_mask"), inputs.get("past_key_values"))
        feed = {name: inputs[name].numpy() for name in self._inputs if isinstance(inputs.get(name), Tensor)}
        if "input_ids" in feed:
            shape = feed["input_ids"].shape
            feed.setdefault("attention_mask", np.ones(shape, np.int64))
            feed.setdefault("token_type_ids", np.zeros(shape, np.int64))
        given = {name: value for name, value in feed.items() if name in self._inputs}
        found = torch.from_numpy(self.session.run([self._output], given)[0])
        return SimpleNamespace(**{self._output: found})

    def _step(self, ids: Tensor, mask: Tensor | None, cache: dict[str, Any] | None) -> SimpleNamespace:
        assert self._decoder is not None
        kept = self._decoder.empty_cache(len(ids)) if cache is None else cache
        length = next(iter(kept.values())).shape()[2] + ids.shape[1]
        seen = np.ones((len(ids), length), np.int64) if mask is None else mask.numpy()
        logits = torch.from_numpy(self._decoder.step(ids.numpy(), seen, kept))
        return SimpleNamespace(logits=logits, past_key_values=kept)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, generation_config: Any) -> Tensor:
        """Prompts and their greedy continuations int64 [batch, prompt + new].

        Args:
            input_ids: int64 [batch, tokens], padded on the left.
            attention_mask: int64 [batch, tokens].
            generation_config: its `max_new_tokens` and `eos_token_id` count; decoding is greedy.
        """
        assert self._decoder is not None
        end = generation_config.eos_token_id
        stop = [] if end is None else end if isinstance(end, list) else [end]
        made = self._decoder.generate(input_ids.numpy(), attention_mask.numpy(), generation_config.max_new_tokens, stop)
        return torch.cat([input_ids, torch.from_numpy(made)], dim=1)
