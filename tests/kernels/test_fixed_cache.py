"""Steps over a cache of fixed size: page summaries that are kept say what fresh ones say, also in a captured graph."""

import copy
import gc
import inspect

import pytest
import torch
from transformers import LlamaForCausalLM, StaticCache

from prunekit.core.errors import RuntimePolicyError
from prunekit.runtime import attach
from prunekit.runtime.attention import interface, kept
from prunekit.runtime.attention.patterns.block_topk import BlockTopk
from prunekit.runtime.attention.patterns.neighborhood import Neighborhood
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.quest import Quest
from prunekit.runtime.attention.policy import policy_number
from tests.kernels.models import llama

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
pytestmark = pytest.mark.filterwarnings("ignore:sparse attention runs in plain torch")


@pytest.fixture
def model():
    return llama()


def tokens(n, seed, batch=2):
    return torch.randint(1, 100, (batch, n), generator=torch.Generator().manual_seed(seed))


def forward(model, ids, cache):
    return model(ids, **{CACHE: cache}, use_cache=True).logits[:, -1:]


def fixed(model, size=300):
    return StaticCache(model.config, max_cache_len=size)


def step(model, ids, cache):
    """Logits of a step, after a look that a copy of the cache, for which nothing is kept, gives the same ones."""
    expected = forward(model, ids, copy.deepcopy(cache))
    got = forward(model, ids, cache)
    assert torch.equal(got, expected)
    return got


def made_from(cache):
    """First page that the last step made, one for all layers."""
    places = [kept._place(layer.keys) for layer in cache.layers]
    (first,) = {int(f.pages.first.min()) for place, f in kept._FIXED.items() if place[:-1] in places}
    return first


def holds(pattern, cache):
    """Whether what is kept for a cache is, bit by bit, what its keys say."""
    for layer in cache.layers:
        n_filled, pages = int(layer.cumulative_length), kept._FIXED[(*kept._place(layer.keys), pattern)].pages
        for mine, fresh in zip(pages.summaries, pattern.summaries(layer.keys[:, :, :n_filled]), strict=True):
            if not torch.equal(mine[:, :, : fresh.shape[2]], fresh):
                return False
    return True


@pytest.mark.parametrize(("pattern", "size"), [(Quest(4, 24), 4), (BlockTopk(2), 128)], ids=str)
def test_kept_pages_say_what_fresh_ones_say(model, pattern, size):
    with attach(model, pattern):
        first, second = fixed(model), fixed(model)
        for cache, n in ((first, 130), (second, 141)):
            forward(model, tokens(n, n), cache)
        for n in range(20):
            for cache, long in ((first, 130), (second, 141)):
                step(model, tokens(1, n), cache)
                # Only the page that the token before was in, and what follows.
                assert made_from(cache) == (0 if n == 0 else (long + n - 1) // size)
                assert holds(pattern, cache)


def test_a_prompt_lets_all_pages_be_made_anew(model):
    with attach(model, Quest(4, 24)):
        cache = fixed(model)
        forward(model, tokens(90, 0), cache)
        step(model, tokens(1, 1), cache)
        # The same length and the same last tokens, so that the newest keys of the first layer are those of before.
        cache.reset()
        other = torch.cat([tokens(60, 7), tokens(90, 0)[:, 60:]], 1)
        forward(model, other, cache)
        step(model, tokens(1, 1), cache)
        assert made_from(cache) == 0
        # Several tokens at once.
        forward(model, tokens(9, 5), cache)
        step(model, tokens(1, 2), cache)
        assert made_from(cache) == 0
        step(model, tokens(1, 3), cache)
        assert made_from(cache) == 99 // 4 + 1


def test_what_ran_without_the_pattern_is_noticed(model):
    cache = fixed(model)
    with attach(model, Quest(4, 24)):
        forward(model, tokens(90, 0), cache)
        for n in range(4):
            step(model, tokens(1, n), cache)
    cache.reset()
    forward(model, tokens(93, 9), cache)
    with attach(model, Quest(4, 24)):
        step(model, tokens(1, 1), cache)
        assert made_from(cache) == 0
        # Written to by hand: longer than it was with other tokens, and shorter.
        for n in (120, 70):
            with torch.no_grad():
                for layer in cache.layers:
                    layer.keys[:, :, :n].normal_()
                    layer.cumulative_length.fill_(n)
            step(model, tokens(1, 2), cache)
            assert made_from(cache) == 0
            step(model, tokens(1, 3), cache)
            assert made_from(cache) == n // 4


def test_summaries_go_with_their_cache(model):
    with attach(model, Quest(4, 24)):
        caches = [fixed(model), fixed(model)]
        for cache in caches:
            forward(model, tokens(90, 0), cache)
            step(model, tokens(1, 1), cache)
        places = [kept._place(layer.keys)[:-1] for cache in caches for layer in cache.layers]
        del cache, caches[0]
        gc.collect()
    left = {place[:-2] for place in kept._FIXED}
    assert [place in left for place in places] == [False, False, True, True]


def test_layers_that_stay_dense_read_what_is_filled(model):
    dense = forward(model, torch.cat([tokens(90, 0), tokens(1, 1)], 1), fixed(model))
    with attach(model, Quest(4, 24), layers=[]):
        cache = fixed(model)
        forward(model, tokens(90, 0), cache)
        torch.testing.assert_close(step(model, tokens(1, 1), cache), dense)
    with attach(model, Quest(4, 24), layers=[1]):
        cache = fixed(model)
        forward(model, tokens(90, 0), cache)
        assert (step(model, tokens(1, 1), cache) - dense).abs().max() > 1e-3


@pytest.mark.parametrize("pattern", ["dense", Quest(4, 24), Power(8, 2)], ids=str)
def test_compiled_steps_equal_eager_ones(model, pattern):
    torch._dynamo.reset()
    with attach(model, pattern):
        caches = [fixed(model), fixed(model)]
        for cache in caches:
            forward(model, tokens(133, 0), cache)
        compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
        for n in range(6):
            expected = forward(model, tokens(1, n), caches[0])
            got = compiled(tokens(1, n), **{CACHE: caches[1]}, use_cache=True).logits[:, -1:]
            torch.testing.assert_close(got, expected)


def test_masks_of_steps_have_one_shape_whatever_is_filled(model):
    for n in (70, 71):
        padding = torch.ones(2, n + 1, dtype=torch.bool)
        assert interface.attention_mask(2, 1, 96, torch.tensor(n), attention_mask=padding).tolist() == [[[[n + 1]]]] * 2
        padding[0, :5] = False
        mask = interface.attention_mask(2, 1, 96, torch.tensor(n), attention_mask=padding)
        assert mask.shape == (2, 96)
        assert torch.equal(mask[:, : n + 1], padding)
        assert not mask[:, n + 1 :].any()
    # Its width is not the length of a sequence.
    padding = torch.ones(2, 71, dtype=torch.long)
    padding[0, :5] = 0
    with attach(model, {"pattern": "power", "length_tokens": 71}):
        cache = fixed(model)
        model(tokens(70, 0), attention_mask=padding[:, :70], **{CACHE: cache}, use_cache=True)
        model(tokens(1, 0), attention_mask=padding, **{CACHE: cache}, use_cache=True)
        with pytest.raises(RuntimePolicyError, match="a sequence of 72 tokens"):
            model(
                tokens(1, 0), attention_mask=torch.cat([padding, padding[:, -1:]], 1), **{CACHE: cache}, use_cache=True
            )


def test_a_pattern_with_an_order_of_its_own_steps_eagerly_alone(model, monkeypatch):
    cache = fixed(model)
    forward(model, tokens(299, 0), cache)
    expected = forward(model, tokens(1, 1), copy.deepcopy(cache))
    with attach(model, Neighborhood((10, 30), (10, 30), causal_axes=1)):
        torch.testing.assert_close(forward(model, tokens(1, 1), copy.deepcopy(cache)), expected)
        monkeypatch.setattr(interface, "cannot_ask", lambda tensor: True)
        with pytest.raises(RuntimePolicyError, match="compiled or captured step"):
            forward(model, tokens(1, 1), cache)


def test_only_patterns_by_score_score_pages(model):
    with attach(model, "power"):
        number = policy_number(model.config)
    q, k, filled = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 64, 16), torch.ones(1, dtype=torch.int32)
    with pytest.raises(RuntimePolicyError, match="`power` scores no pages"):
        kept.fixed_page_scores(q, k, filled, number)


@pytest.fixture
def large():
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "max_position_embeddings": 1024}
    return llama(**sizes).to("cuda", torch.bfloat16)


def written(model, cache, given):
    """Logits of a step for each of the given tokens [B, n]."""
    return torch.cat([forward(model, given[:, n : n + 1], cache).float() for n in range(given.shape[1])], 1)


def captured(model, cache):
    """A graph of one step, with the tokens that it reads and the logits that it writes.

    Three steps are run before, as capturing asks for; the cache is put back to where it was.
    """
    lengths = [layer.cumulative_length.clone() for layer in cache.layers]
    ids = torch.zeros(2, 1, dtype=torch.long, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward(model, ids, cache)
    torch.cuda.current_stream().wait_stream(stream)
    for layer, length in zip(cache.layers, lengths, strict=True):
        layer.cumulative_length.copy_(length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = forward(model, ids, cache).float()
    return graph, ids, logits


def replayed(step, given):
    """As `written`, by a graph."""
    graph, ids, logits = step
    found = []
    for n in range(given.shape[1]):
        ids.copy_(given[:, n : n + 1])
        graph.replay()
        found.append(logits.clone())
    return torch.cat(found, 1)


def same(got, expected):
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
    first, second = expected.topk(2).values.unbind(-1)
    clear = first - second > 0.05
    assert clear.float().mean() > 0.3
    assert torch.equal(got.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", [Quest(16, 128), BlockTopk(2), Power(64, 2), "dense"], ids=str)
def test_a_captured_graph_writes_what_eager_steps_write(large, pattern):
    prompts, given = [tokens(400, 0).cuda(), tokens(523, 1).cuda()], tokens(40, 2).cuda()
    with attach(large, pattern):
        right = []
        for prompt in prompts:
            cache = fixed(large, 768)
            forward(large, prompt, cache)
            right.append(written(large, cache, given))
        # Two graphs alive at once, replayed in turn.
        caches, steps = [fixed(large, 768) for _ in prompts], []
        for prompt, cache in zip(prompts, caches, strict=True):
            forward(large, prompt, cache)
            steps.append(captured(large, cache))
        begun = replayed(steps[0], given[:, :15])
        same(replayed(steps[1], given), right[1])
        same(torch.cat([begun, replayed(steps[0], given[:, 15:])], 1), right[0])
        # The caches change prompts: what was kept must not outlive that.
        for step, cache, prompt, expected in zip(steps, caches, prompts[::-1], right[::-1], strict=True):
            cache.reset()
            forward(large, prompt, cache)
            same(replayed(step, given), expected)


@pytest.mark.gpu
def test_a_captured_step_makes_one_page_unless_the_cache_changed(large):
    given = tokens(20, 2).cuda()
    with attach(large, Quest(16, 128)):
        cache = fixed(large, 768)
        forward(large, tokens(400, 0).cuda(), cache)
        step = captured(large, cache)
        replayed(step, given)
        assert made_from(cache) == (400 + 20 - 2) // 16
        assert holds(Quest(16, 128), cache)
    # A prompt that the pattern does not see, and a replay of what was captured under it.
    cache.reset()
    forward(large, tokens(419, 3).cuda(), cache)
    replayed(step, given[:, :1])
    assert made_from(cache) == 0
    assert holds(Quest(16, 128), cache)


@pytest.mark.gpu
def test_compiled_steps_in_cuda_graphs_keep_their_pages(large):
    torch._dynamo.reset()
    given = tokens(40, 2).cuda()
    with attach(large, Quest(16, 128)):
        caches = [fixed(large, 768) for _ in range(2)]
        for cache in caches:
            forward(large, tokens(400, 0).cuda(), cache)
        expected = written(large, caches[0], given)
        compiled, found = torch.compile(large.forward, mode="reduce-overhead", fullgraph=True), []
        for n in range(40):
            ids = given[:, n : n + 1].clone()
            found.append(compiled(ids, **{CACHE: caches[1]}, use_cache=True).logits.float().clone())
        # Fused kernels round otherwise, so that now and then another page is the best.
        assert (torch.cat(found, 1) - expected).norm() <= 0.1 * expected.norm()
        assert made_from(caches[1]) == (400 + 40 - 2) // 16
        assert holds(Quest(16, 128), caches[1])


@pytest.mark.gpu
def test_kept_pages_on_a_gpu_are_those_of_the_cpu(large):
    from prunekit_kernels.page_summaries import KeptPages, renew_pages

    x = torch.randint(-4, 5, (2, 2, 1000, 128), device="cuda").to(torch.bfloat16)
    for page, mean in ((16, False), (128, True), (1, False), (256, False)):
        here = KeptPages.room(x, page, -(-1000 // page), mean)
        there = KeptPages.room(x.cpu(), page, -(-1000 // page), mean)
        for rows in ((700, 1), (701, 2), (830, 300), (1000, 299)):
            filled = torch.tensor(rows, dtype=torch.int32)
            renew_pages(x, filled.cuda(), here)
            renew_pages(x.cpu(), filled, there)
            both = zip(
                (here.first, here.newest, *here.summaries), (there.first, there.newest, *there.summaries), strict=True
            )
            for a, b in both:
                torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-2)
