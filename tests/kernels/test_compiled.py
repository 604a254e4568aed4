"""Decoding steps compiled into CUDA graphs write what eager steps write."""

import pytest
import torch
from transformers import StaticCache

from prunekit.runtime import attach
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.quest import Quest
from tests.kernels.models import llama


def steps(model, run, ids, n):
    """Logits of `n` greedy steps after a prompt, over a cache of fixed size."""
    cache = StaticCache(model.config, max_cache_len=512)
    new = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    found = []
    for _ in range(n):
        logits = run(new, past_key_values=cache, use_cache=True).logits.clone()
        new = logits[:, -1:].argmax(-1)
        found.append(logits)
    return torch.cat(found, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["dense", Power(64, 2), Quest(16, 128)], ids=str)
def test_a_step_in_a_cuda_graph_equals_the_eager_one(pattern):
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model = llama(hidden_size=512, intermediate_size=512, num_attention_heads=8).to("cuda", torch.bfloat16)
    ids = torch.randint(1, 100, (2, 400), device="cuda")
    with attach(model, pattern):
        expected = steps(model, model.forward, ids, 5)
        compiled = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        got = steps(model, compiled, ids, 5)
    torch.testing.assert_close(got, expected, rtol=3e-2, atol=3e-2)
    assert counters["inductor"]["cudagraph_skips"] == 0
