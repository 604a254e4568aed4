"""Text that the teacher writes, for where no corpus is at hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from prunekit.core.errors import UsageError
from prunekit.heal.scene import Scene
from prunekit.modeling.kv_cache import cache_argument
from prunekit.modeling.quiet import quiet

# For the KV cache and the draws while the teacher writes; a step takes a GPU as long for one sequence as for hundreds.
_CACHE_BYTES = {"cpu": 1e9, "mps": 2e9}
_OF_FREE_MEMORY = 0.6
_MOST_AT_ONCE = 8192


class _Room(DynamicLayer):
    """Keys and values of a layer in room that is taken once: nothing is copied or allocated for a further token.

    Args:
        tokens: that there is room for in each sequence.
    """

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens
        self._held: list[Tensor] = []
        self._filled = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens [B, H, T, D] and returns all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._held = [states.new_empty((*states.shape[:2], self._tokens, states.shape[3]))
                          for states in (key_states, value_states)]  # fmt: skip
        begin, end = self._filled, self._filled + key_states.shape[-2]
        for held, states in zip(self._held, (key_states, value_states), strict=True):
            held[:, :, begin:end] = states
        self._filled = end
        keys, values = (held[:, :, :end] for held in self._held)
        self.keys, self.values = keys, values
        return keys, values


def _cache(model: Any, tokens: int) -> dict[str, Any]:
    """The KV cache to write with, as an argument; none where a layer of the model does not keep every token."""
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return {}
    cache.layers = [_Room(tokens) for _ in cache.layers]
    return {cache_argument(model): cache}


def sampled(scene: Scene, count: int, prompts: Tensor | None, seed: int) -> Iterator[Tensor]:
    """Sequences drawn from the teacher's distribution at temperature 1, whole vocabulary, in batches.

    Where a document ends the next one follows in the same sequence, as in a packed corpus.

    Args:
        scene: the teacher.
        count: how many.
        prompts: what they begin with, int64 [count, tokens]; None begins with the BOS token (EOS where there is none).
        seed: of the draws; torch's own state stays as it was.
    Returns:
        int64 [at most 8192, T] on the CPU, several times.
    """
    length = scene.asked.length_tokens
    begin = torch.full((count, 1), _begin(scene), dtype=torch.int64) if prompts is None else prompts
    model = scene.load_teacher()
    scene.talk(f"the teacher writes {count} sequences of {length} tokens")
    with scene.progress.task("sampling from the teacher", total=count, unit="sequences") as task:
        for number, part in enumerate(begin.split(_at_once(model, length, scene.device))):
            with torch.random.fork_rng(), torch.no_grad(), quiet():
                torch.manual_seed(seed * 1_000_003 + number)
                ids = model.generate(
                    part.to(model.device),
                    attention_mask=torch.ones_like(part).to(model.device),
                    **_cache(model, length),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    repetition_penalty=1.0,
                    max_new_tokens=length - part.shape[1],
                    # A token that never comes: nothing ends a sequence early.
                    eos_token_id=-1,
                    pad_token_id=0,
                )
            yield ids.cpu()
            task.advance(len(part))


def _at_once(model: Any, length: int, device: str) -> int:
    """Sequences whose keys, values and next tokens' probabilities fit."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    a_token = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize
    # A draw holds logits, scores, probabilities and their noise in float32.
    a_draw = 4 * 4 * config.vocab_size
    room = _OF_FREE_MEMORY * torch.cuda.mem_get_info()[0] if device == "cuda" else _CACHE_BYTES[device]
    return max(1, min(_MOST_AT_ONCE, int(room / (a_token * length + a_draw))))


def _begin(scene: Scene) -> int:
    for token in (scene.tokenizer.bos_token_id, scene.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UsageError(
        "the tokenizer has no BOS and no EOS token", hint="give `prompts`, a text that the sequences begin with"
    )
