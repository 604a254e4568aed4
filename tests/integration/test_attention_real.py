"""SmolLM2 under a dense pattern writes what it always writes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from prunekit.checkpoint.sources import resolve
from prunekit.modeling.load import load_model, load_tokenizer
from prunekit.runtime import attach

pytestmark = pytest.mark.filterwarnings("ignore:sparse attention runs in plain torch")
TEXT = "The key to the old house is 47. " + "The sky is blue and the grass is green. " * 4 + "The key to the"


@pytest.fixture(scope="module")
def smollm2():
    folder = resolve("smollm2-135m-instruct").folder
    return load_model(folder, "float32", "cpu", False), load_tokenizer(folder)


def written(model, ids, cache=None) -> list[int]:
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
    return made[0, ids.shape[1] :].tolist()


def test_a_dense_pattern_writes_what_the_stock_model_writes(smollm2) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    expected = written(model, ids)
    with attach(model, "dense"):
        assert written(model, ids, DynamicCache()) == expected
        assert written(model, ids, StaticCache(model.config, max_cache_len=ids.shape[1] + 16)) == expected
    with attach(model, {"pattern": "sink_window", "sink_tokens": 0, "window_tokens": 1}):
        assert written(model, ids) != expected
