"""Patterns that choose by score: what they list, and what a step over a cache reads."""

import _thread
import gc
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import DynamicCache, StaticCache

from prunekit.core.errors import RuntimePolicyError, UsageError
from prunekit.runtime import attach
from prunekit.runtime.attention import kept
from prunekit.runtime.attention.decode import step
from prunekit.runtime.attention.kept import growing_summaries, prompt_seen
from prunekit.runtime.attention.patterns.antidiagonal import Antidiagonal
from prunekit.runtime.attention.patterns.block_topk import BlockTopk
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.quest import Quest
from prunekit.runtime.attention.patterns.sink_window import SinkWindow
from prunekit.runtime.attention.patterns.streaming import Streaming
from prunekit.runtime.attention.patterns.vertical_slash import VerticalSlash
from tests.kernels.models import llama

SCORED = (
    Antidiagonal(0.6), Antidiagonal(0.9, 8), Antidiagonal(keep_blocks=2), Antidiagonal(0.6, query_step=4),
    BlockTopk(2), VerticalSlash(1, 1),
)  # fmt: skip
EVERY = (*SCORED, Quest(4, 24), Power(8, 2), SinkWindow(3, 12), Streaming(8, 1, 2))
GREEDY = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
pytestmark = pytest.mark.filterwarnings("ignore:sparse attention runs in plain torch")


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 100, (2, 70), generator=torch.Generator().manual_seed(1))


def draw(heads, tokens, seed):
    return torch.randn(1, heads, tokens, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [63, 128, 1000, 1111])
@pytest.mark.parametrize("pattern", SCORED, ids=str)
def test_lists_are_causal_and_every_query_reads_its_own_block(pattern, n):
    q, k = draw(4, n, 0), draw(2, n, 1)
    lists = pattern.prompt_lists(q, k, 0.125)
    mask = lists.dense()
    assert mask.shape == (4, n, n)
    assert not mask.triu(1).any()
    assert mask.diagonal(dim1=1, dim2=2).all()
    assert mask[:, :, 0].all()
    if n > 1000 and pattern.example != Antidiagonal.example:
        assert mask.float().mean() < 0.45


@pytest.mark.parametrize("pattern", SCORED, ids=str)
def test_part_of_a_prompt_over_a_cache_reads_its_own_past(pattern):
    q, k = draw(4, 300, 0), draw(2, 1000, 1)
    mask = pattern.prompt_lists(q, k, 0.125).dense()
    own = torch.arange(300) + 700
    assert mask[:, torch.arange(300), own].all()
    assert not (mask & (torch.arange(1000) > own[:, None])).any()


def test_antidiagonal_reaches_its_mass():
    q, k = draw(4, 1024, 0) * 3, draw(4, 1024, 1)
    lists = Antidiagonal(0.7, 2).prompt_lists(q, k, 0.125)
    weights = (q @ k.transpose(2, 3) * 0.125).masked_fill(torch.ones(1024, 1024).triu(1).bool(), -torch.inf).softmax(-1)
    kept = (weights[0] * lists.dense()).unflatten(1, (8, 128)).sum((2, 3)) / 128
    assert kept.min() > 0.5
    assert lists.counts.sum() < 4 * 36


def test_antidiagonal_finds_a_block_that_stands_out():
    q, k = draw(1, 1024, 0), draw(1, 1024, 1)
    k[0, 0, 256:384] += 2.0 * q[0, 0, 900:1024].mean(0) / q[0, 0, 900:1024].mean(0).norm() * 4
    q[0, 0, 896:] += q[0, 0, 900:1024].mean(0) / q[0, 0, 900:1024].mean(0).norm() * 4
    for pattern in (Antidiagonal(keep_blocks=3), Antidiagonal(keep_blocks=3, query_step=4), BlockTopk(3)):
        lists = pattern.prompt_lists(q, k, 0.125)
        assert sorted(lists.indices[0, 7, :3].tolist()) == [0, 2, 7]


def test_antidiagonal_with_a_step_sees_the_queries_that_are_scored():
    q, k = draw(1, 1024, 0), draw(1, 1024, 1)
    wanted = k[0, 0, 256:384].mean(0)
    k[0, 0, 256:384] += 8 * wanted / wanted.norm()
    # Of the last block, queries 112 to 127 are scored and queries 0 to 111 are not.
    for first, last, found in ((1008, 1024, True), (896, 1008, False)):
        looking = q.clone()
        looking[0, 0, first:last] += 8 * wanted / wanted.norm()
        lists = Antidiagonal(keep_blocks=3, stride=16, query_step=8).prompt_lists(looking, k, 0.125)
        every = Antidiagonal(keep_blocks=3, stride=16).prompt_lists(looking, k, 0.125)
        assert (2 in lists.indices[0, 7, :3].tolist()) is found
        assert 2 in every.indices[0, 7, :3].tolist()


def test_vertical_slash_finds_a_column_and_a_diagonal():
    q, k = torch.zeros(1, 1, 1024, 64), torch.zeros(1, 1, 1024, 64)
    q[..., 0] = 30.0
    k[0, 0, 300, 0] = 9.0
    found = VerticalSlash(2, 1).prompt_lists(q, k, 0.125).dense()[0]
    assert found[1000, 256:384].all()
    # Tokens mark their place on a circle, and queries look 400 tokens back.
    angle = torch.arange(1024) * 2 * torch.pi / 1024
    k = torch.stack([angle.cos(), angle.sin()], 1)[None, None] * 60
    back = angle - 400 * 2 * torch.pi / 1024
    q = torch.stack([back.cos(), back.sin()], 1)[None, None] * 60
    found = VerticalSlash(1, 2).prompt_lists(q, k, 0.7).dense()[0]
    rows = torch.arange(400, 1024)
    assert found[rows, rows - 400].all()


def test_what_is_kept_when_nothing_is_left_out_equals_dense(model, ids):
    expected = model(ids).logits
    for pattern in (Antidiagonal(1.0), Antidiagonal(1.0, query_step=8), BlockTopk(4), VerticalSlash(4, 4), Quest()):
        with attach(model, pattern):
            torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_dense_pattern_writes_what_the_stock_model_writes(model, ids, kind):
    def cache():
        return StaticCache(model.config, max_cache_len=96) if kind is StaticCache else DynamicCache()

    expected = model.generate(ids, past_key_values=cache(), **GREEDY)
    with attach(model, "dense"):
        got = model.generate(ids, past_key_values=cache(), **GREEDY)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("pattern", EVERY, ids=str)
def test_both_kinds_of_cache_write_the_same(model, ids, pattern):
    with attach(model, pattern):
        grown = model.generate(ids, **GREEDY)
        fixed = model.generate(ids, past_key_values=StaticCache(model.config, max_cache_len=128), **GREEDY)
    assert grown.tolist() == fixed.tolist()


@pytest.mark.parametrize("pattern", EVERY, ids=str)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("pads", [16, 11])
def test_a_padded_prompt_writes_what_it_writes_alone(model, ids, pattern, kind, pads):
    def cache():
        return StaticCache(model.config, max_cache_len=96) if kind is StaticCache else DynamicCache()

    short = ids[:1, :48]
    batch = torch.stack([torch.cat([torch.zeros(pads, dtype=torch.long), short[0]]), ids[1, : pads + 48]])
    mask = torch.ones_like(batch)
    mask[0, :pads] = 0
    with attach(model, pattern):
        alone = model.generate(short, **GREEDY)[0, -12:]
        both = model.generate(batch, attention_mask=mask, past_key_values=cache(), **GREEDY)
    assert both[0, -12:].tolist() == alone.tolist()


def attended(pattern, module, q, k, v, mask=None):
    return step(pattern, module, q, k, v, mask, None)


def test_quest_reads_the_pages_with_the_highest_bound():
    q, k, v = draw(4, 1, 0), draw(2, 50, 1), draw(2, 50, 2)
    out = attended(Quest(4, 16), torch.nn.Module(), q, k, v)
    for g in range(2):
        bounds = []
        for page in range(13):
            keys = k[0, g, page * 4 : page * 4 + 4]
            mine = q[0, 2 * g : 2 * g + 2, 0]
            bounds.append(torch.maximum(mine * keys.amin(0), mine * keys.amax(0)).sum(1).max())
        best = torch.stack(bounds[:12]).topk(3).indices.tolist()
        tokens = [t for page in sorted(best) for t in range(page * 4, page * 4 + 4)] + [48, 49]
        weights = (q[0, 2 * g : 2 * g + 2, 0] @ k[0, g, tokens].T / 8).softmax(-1)
        torch.testing.assert_close(out[0, 2 * g : 2 * g + 2, 0], weights @ v[0, g, tokens])


@pytest.mark.parametrize("pattern", [Quest(4, 16), BlockTopk(2)], ids=str)
def test_kept_summaries_say_what_fresh_ones_say(pattern):
    module, k, v = torch.nn.Module(), draw(2, 700, 1), draw(2, 700, 2)
    for n in (300, 301, 302, 400, 401, 640, 641, 700):
        q = draw(4, 1, n)
        kept = attended(pattern, module, q, k[:, :, :n], v[:, :, :n])
        assert torch.equal(kept, attended(pattern, torch.nn.Module(), q, k[:, :, :n], v[:, :, :n]))
    other = draw(2, 701, 7)
    kept = attended(pattern, module, q, other, other)
    assert torch.equal(kept, attended(pattern, torch.nn.Module(), q, other, other))


def test_threads_that_write_with_one_model_keep_their_own_summaries(model, ids):
    def written(row):
        return [model.generate(ids[row : row + 1], **GREEDY).tolist() for _ in range(5)]

    with attach(model, Quest(4, 24)):
        expected = [written(row) for row in range(2)]
        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(written, range(2))) == expected


def test_summaries_go_with_their_thread_their_layer_and_their_cache():
    layer, pattern, made = torch.nn.Module(), Quest(4, 24), []

    def step_of(layer, n):
        growing_summaries(pattern, layer, draw(2, 200, n))
        made.append(weakref.ref(kept._growing(layer).made[1].newest))

    # A thread that `threading` does not know, as those of C++ are.
    done, alone = threading.Event(), [layer, 1]
    _thread.start_new_thread(lambda: (step_of(*alone), done.set()), ())
    assert done.wait(20)
    alone.clear()
    ended = time.monotonic() + 20
    while made[0]() is not None and time.monotonic() < ended:
        time.sleep(0.01)
    step_of(layer, 2)
    assert [place() is None for place in made] == [True, False]
    cache = draw(2, 200, 3)
    kept.find_room(pattern, layer, cache)
    (room,) = [fixed for place, fixed in kept._FIXED.items() if place[:-1] == kept._place(cache)]
    made.append(weakref.ref(room.pages.newest))
    del cache, room
    prompt_seen(pattern, torch.nn.Module(), draw(2, 60, 4), False)
    assert made[2]() is None
    del layer
    gc.collect()
    assert made[1]() is None


def test_threads_that_make_and_drop_caches_of_fixed_size_do_not_meet():
    layer, pattern, rounds = torch.nn.Module(), Quest(4, 24), 500

    def prompts(_):
        for _ in range(rounds):
            prompt_seen(pattern, layer, torch.zeros(1, 1, 64, 8), True)

    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(prompts, range(4)))
    finally:
        sys.setswitchinterval(often)


def test_beams_that_change_places_read_their_own_pages(model, ids):
    with attach(model, Quest(4, 24)):
        first = model.generate(ids, num_beams=3, max_new_tokens=10, do_sample=False, pad_token_id=0)
        again = model.generate(ids.flip(0), num_beams=3, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert first.tolist() == again.flip(0).tolist()


@pytest.mark.parametrize(("pads", "between", "behind"), [(8, 0, 0), (7, 0, 0), (0, 0, 5), (7, 0, 3), (3, 6, 2)])
def test_padding_is_not_read_and_shapes_no_page(pads, between, behind):
    q, k, v = draw(4, 1, 0), draw(2, 60, 1), draw(2, 60, 2)
    mask = torch.zeros(1, 60, dtype=torch.bool)
    mask[0, pads : 60 - behind] = True
    mask[0, 30 : 30 + between] = False
    seen = mask[0]
    alone = attended(Quest(4, 16), torch.nn.Module(), q, k[:, :, seen], v[:, :, seen])
    k[:, :, ~mask[0]], v[:, :, ~mask[0]] = 1e4, float("nan")
    torch.testing.assert_close(attended(Quest(4, 16), torch.nn.Module(), q, k, v, mask), alone)


def test_scored_patterns_refuse_what_they_cannot_honour(model, ids):
    n = ids.shape[1]
    mask = torch.ones(2, 1, n, n, dtype=torch.bool).tril(0)
    with attach(model, BlockTopk(2)), pytest.raises(RuntimePolicyError, match="chooses blocks by score"):
        model(ids, attention_mask=mask)
    with pytest.raises(UsageError, match="does not divide blocks"):
        Antidiagonal(stride=24)
    with pytest.raises(UsageError, match="`query_step: 16` with `stride: 16`"):
        Antidiagonal(query_step=16)
    with pytest.raises(UsageError, match="is no share"):
        Antidiagonal(mass=1.5)
    with pytest.raises(UsageError, match="`budget_tokens: 8`"):
        Quest(16, 8)
    with pytest.raises(UsageError, match="`budget_tokens: 30` is no multiple of pages of 16"):
        Quest(16, 30)
