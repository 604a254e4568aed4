"""Decoders without some attention continue text alike with a cache, without one, and padded on the left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from prunekit.modeling.kv_cache import cache_argument, cache_of
from prunekit.modeling.modeling_prunekit import cache_slots
from tests.heterogeneous import without
from tests.tiny import BLOCKS, DECODERS, EAGER, tiny_inputs, tiny_model

TOLERANCE = 1e-12
# Where the softmax is in float32.
FLOAT32 = 1e-5
WHERE = {"first": [0], "middle": [1, 2], "last": [3], "first-and-last": [0, 3]}
parametrize = pytest.mark.parametrize("gone", WHERE.values(), ids=WHERE)


def pruned(family: str, gone: list[int], **changes: Any) -> Any:
    return without(tiny_model(family, **changes), *((block, "attention") for block in gone), (2, "mlp"))


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=6,
        min_new_tokens=6,
        pad_token_id=0,
        **options,
    )
    return made[:, ids.shape[1] :]


def crops_empty_layers() -> bool:
    try:
        DynamicLayer().crop(-1)
    except TypeError:
        return False
    return True


@parametrize
@pytest.mark.parametrize("family", DECODERS)
def test_pieces_with_a_cache_equal_one_pass(family: str, gone: list[int]) -> None:
    model, ids = pruned(family, gone), tiny_inputs(family, length=17)["input_ids"]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        found, cache = [], None
        for piece in ids.split([7, 1, 1, 5, 3], dim=1):
            output = model(piece, use_cache=True, **{cache_argument(model): cache})
            cache = cache_of(output)
            found.append(output.logits)
    assert (torch.cat(found, dim=1) - whole).abs().max() < (FLOAT32 if family in EAGER else TOLERANCE)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_does_not_depend_on_cache_or_padding(family: str) -> None:
    model, ids = pruned(family, [0, 2]), tiny_inputs(family, length=9)["input_ids"]
    model = model.float() if family in EAGER else model
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cached = generate(model, ids, mask)
    assert torch.equal(cached, generate(model, ids, mask, use_cache=False))
    assert torch.equal(cached[:1], generate(model, ids[:1, 5:]))


@pytest.mark.parametrize("family", DECODERS)
def test_generation_without_any_attention(family: str) -> None:
    model = without(tiny_model(family), *((block, "attention") for block in range(BLOCKS)))
    ids = tiny_inputs(family)["input_ids"]
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))


@pytest.mark.parametrize("family", DECODERS)
def test_static_cache_gives_the_same_tokens(family: str) -> None:
    model, ids = pruned(family, [0, 3]), tiny_inputs(family)["input_ids"]
    assert torch.equal(generate(model, ids, cache_implementation="static"), generate(model, ids))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_other_ways_of_generating_do_not_depend_on_the_cache(options: dict[str, int]) -> None:
    if "prompt_lookup_num_tokens" in options and not crops_empty_layers():
        pytest.skip("this version of transformers cannot take tokens back from a cache with empty layers")
    model, ids = pruned("llama", [0, 2]), tiny_inputs("llama", batch=1)["input_ids"]
    expected = generate(model, ids, **({"use_cache": False} | options if "num_beams" in options else {}))
    assert torch.equal(generate(model, ids, **options), expected)


@parametrize
@pytest.mark.parametrize("family", DECODERS)
def test_removed_attention_holds_no_cache(family: str, gone: list[int]) -> None:
    model = pruned(family, gone)
    with torch.no_grad():
        cache = cache_of(model(**tiny_inputs(family), use_cache=True))
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None and layer.keys.numel()]
    assert len(held) == BLOCKS - len(gone)
    assert cache.get_seq_length() == 9


def test_alternating_windows_keep_their_own_cache_layers() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    for gone in ([0], [1, 3], [0, 1]):
        model = pruned("qwen2", gone, layer_types=types)
        ids = tiny_inputs("qwen2", length=15)["input_ids"]
        mask = torch.ones_like(ids)
        mask[0, :4] = 0
        assert torch.equal(generate(model, ids, mask), generate(model, ids, mask, use_cache=False))


@pytest.mark.parametrize(
    ("types", "kept", "relabelled", "slots"),
    [
        ("FFFF", "-+-+", "FFFF", [None, 0, None, 1]),
        ("FFSS", "--+-", "SSSS", [None, None, 0, None]),
        ("FSFS", "+-++", "FFFS", [0, None, 1, 3]),
        ("SFSF", "-+++", "FFSF", [None, 0, 2, 3]),
    ],
)
def test_cache_slots_start_with_an_attention(types: str, kept: str, relabelled: str, slots: list[int | None]) -> None:
    assert cache_slots(types, [sign == "+" for sign in kept]) == (list(relabelled), slots)
