"""Sparse decode: the reference against plain attention, the kernels against float64.

Run as a script it interprets the kernels and prints their errors as JSON. That takes a process of its own: Triton
decides when it is first imported whether its functions are interpreted.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from prunekit_kernels.sparse_decode import PageLists, cases, refusal, sparse_decode
from prunekit_kernels.sparse_decode.chunks import Chunks, choose_chunks, cluster_chunks
from prunekit_kernels.sparse_decode.op import hopper_chunks
from prunekit_kernels.sparse_decode.reference import decode_reference
from tests.kernels.compare import errors, expect_close
from tests.kernels.interpreter import on_one_thread_and_poisoned, under_interpreter

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Interpreted: each small case in each type, and shapes drawn from seeds; the seed is in the test's name.
RUNS = {f"{case.name}-{dtype}": (case, dtype, 1) for case in cases.SMALL for dtype in DTYPES} | {
    f"seed{seed}-{cases.random_case(seed).name}-{DTYPES[seed % 3]}": (cases.random_case(seed), DTYPES[seed % 3], seed)
    for seed in range(100, 118)
}


def by_name(case):
    return case.name


def expected_of(q, k, v, lists):
    """The reference in float64."""
    return decode_reference(
        q.double(), k.double(), v.double(), lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged,
        q.shape[-1] ** -0.5,
    )  # fmt: skip


def plain(q, k, v, rows):
    """Softmax over the given tokens of one sequence, [H, Q, D]: query i of Q leaves out the last Q - 1 - i."""
    queries, n = q.shape[1], len(rows)
    group = q.shape[0] // k.shape[0]
    mask = torch.ones(queries, n, dtype=torch.bool).tril(n - queries)
    keys, values = (t[:, rows].repeat_interleave(group, 0) for t in (k, v))
    scores = (q @ keys.transpose(1, 2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ values


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("tokens", [1, 63, 100, 1000, 4097])
@pytest.mark.parametrize("page", [1, 16, 64])
def test_full_lists_equal_plain_attention(tokens, page):
    q, k, v = draw(2, 4, 1, 64, seed=1), draw(2, 2, tokens, 64, seed=2), draw(2, 2, tokens, 64, seed=3)
    lists = PageLists.whole(torch.full((2, 2), tokens), tokens, page)
    out, lse = sparse_decode(q, k, v, lists)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, enable_gqa=True))
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) / 8
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())


def test_listed_pages_are_what_is_read():
    q, k, v = draw(1, 4, 1, 64, seed=1), draw(1, 2, 96, 64, seed=2), draw(1, 2, 96, 64, seed=3)
    lists = PageLists.from_lists([[torch.tensor([2, 0]), torch.tensor([5])]], 16, paged=False)
    out, _ = sparse_decode(q, k, v, lists)
    first, second = [*range(32, 48), *range(16)], [*range(80, 96)]
    torch.testing.assert_close(out[0, :2], plain(q[0, :2], k[0, :1], v[0, :1], first))
    torch.testing.assert_close(out[0, 2:], plain(q[0, 2:], k[0, 1:], v[0, 1:], second))


def test_the_last_listed_page_may_be_part_full():
    q, k, v = draw(1, 2, 1, 64, seed=1), draw(1, 1, 96, 64, seed=2), draw(1, 1, 96, 64, seed=3)
    table, tokens = torch.tensor([[[4, 1, 3]]]), torch.tensor([[21]])
    out, _ = sparse_decode(q, k, v, PageLists.from_table(table, tokens, 1, 16, paged=False))
    torch.testing.assert_close(out[0], plain(q[0], k[0], v[0], [*range(64, 80), *range(16, 21)]))


def test_several_queries_are_causal_among_themselves():
    q, k, v = draw(1, 4, 3, 64, seed=1), draw(1, 2, 50, 64, seed=2), draw(1, 2, 50, 64, seed=3)
    out, _ = sparse_decode(q, k, v, PageLists.whole(torch.full((1, 2), 50), 50, 16))
    torch.testing.assert_close(out[0], plain(q[0], k[0], v[0], list(range(50))))
    for i in range(3):
        alone, _ = sparse_decode(q[:, :, i : i + 1], k, v, PageLists.whole(torch.full((1, 2), 48 + i), 50, 16))
        torch.testing.assert_close(out[:, :, i : i + 1], alone)


def test_paged_equals_contiguous():
    q, k, v = draw(2, 4, 1, 64, seed=1), draw(2, 2, 100, 64, seed=2), draw(2, 2, 100, 64, seed=3)
    whole = PageLists.whole(torch.full((2, 2), 100), 100, 16)
    place = torch.randperm(14, generator=torch.Generator().manual_seed(0)).view(2, 7)
    pools = []
    for cache in (k, v):
        pages = torch.nn.functional.pad(cache, (0, 0, 0, 12)).view(2, 2, 7, 16, 64).permute(0, 2, 3, 1, 4)
        pools.append(torch.empty(14, 16, 2, 64, dtype=cache.dtype))
        pools[-1][place.flatten()] = pages.flatten(0, 1)
    lists = PageLists.from_table(place[:, None], torch.full((2, 1), 100), 2, 16, paged=True)
    for got, expected in zip(sparse_decode(q, *pools, lists), sparse_decode(q, k, v, whole), strict=True):
        torch.testing.assert_close(got, expected)


def test_heads_of_different_lengths_share_one_pool():
    q, pool = draw(1, 4, 1, 64, seed=1), draw(30, 1, 1, 64, seed=2)
    rows = [torch.tensor([7, 3, 29]), torch.tensor([11])]
    out, lse = sparse_decode(q, pool, pool, PageLists.from_lists([rows], 1, paged=True))
    flat = pool[:, 0, 0][None]
    torch.testing.assert_close(out[0, :2], plain(q[0, :2], flat, flat, rows[0].tolist()))
    torch.testing.assert_close(out[0, 2:], flat[:, 11:12].expand(2, 1, 64))
    torch.testing.assert_close(lse[0, 2:, 0], (q[0, 2:, 0] @ flat[0, 11] / 8).float())


def test_empty_lists_give_zeros_and_minus_infinity():
    q, k, v = draw(1, 2, 1, 64, seed=1), draw(1, 2, 20, 64, seed=2), draw(1, 2, 20, 64, seed=3)
    out, lse = sparse_decode(q, k, v, PageLists.whole(torch.tensor([[0, 20]]), 20))
    assert (out[0, 0] == 0).all()
    assert (lse[0, 0] == float("-inf")).all()
    assert (out[0, 1] != 0).all()


@pytest.mark.parametrize("case", cases.SMALL, ids=by_name)
def test_nothing_outside_the_lists_is_read(case):
    q, k, v, lists = cases.make(case, torch.float32, "cpu", seed=2)
    expect_close(errors(sparse_decode(q, k, v, lists), expected_of(q, k, v, lists)), torch.float32)


def test_operation_passes_the_checks_of_torch():
    q, k, v, lists = cases.make(cases.SMALL[6], torch.float32, "cpu", seed=0)
    arguments = (
        q, k.nan_to_num_(), v.nan_to_num_(), lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged,
        lists.longest, lists.total, 0.1,
    )  # fmt: skip
    results = torch.library.opcheck(torch.ops.prunekit.sparse_decode.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_operation_compiles_in_one_graph():
    q, k, v, lists = cases.make(cases.SMALL[0], torch.float32, "cpu", seed=0)
    compiled = torch.compile(lambda q: sparse_decode(q, k, v, lists)[0] * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(q), sparse_decode(q, k, v, lists)[0] * 2)


def test_what_does_not_fit_is_refused_with_the_reason():
    q, k, v, lists = cases.make(cases.SMALL[0], torch.float32, "cpu", seed=0)
    with pytest.raises(ValueError, match="do not fit 1 sequences"):
        sparse_decode(q[:1], k, v, lists)
    with pytest.raises(ValueError, match="does not hold 2 sequences"):
        sparse_decode(q, k[:, :1], v[:, :1], lists)
    with pytest.raises(ValueError, match="pages of 16 tokens"):
        sparse_decode(q, k, v, replace(lists, paged=True))
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2"):
        sparse_decode(q[:, :3], k, v, lists)
    with pytest.raises(ValueError, match=r"`tokens` is torch\.int64"):
        sparse_decode(q, k, v, replace(lists, tokens=lists.tokens.long()))
    with pytest.raises(ValueError, match="longer than `longest`, which is 62"):
        sparse_decode(q, k, v, replace(lists, longest=62))


def test_refusal_names_the_reason():
    q = torch.empty(1, 4, 1, 64, device="meta")
    assert "`meta`" in refusal(q, q, q, 4)


@pytest.mark.parametrize("slots", [132, 264, 396])
@pytest.mark.parametrize("longest", [1, 63, 2048, 8192, 131072])
@pytest.mark.parametrize("n_lists", [1, 3, 8, 24, 64, 256, 300, 1024])
def test_chunks_cover_the_lists_and_fill_the_card(n_lists, longest, slots):
    chunks = choose_chunks(n_lists, longest, n_lists * longest, 64, slots)
    assert (chunks.n - 1) * chunks.tokens < longest <= chunks.n * chunks.tokens
    assert chunks.tokens % 64 == 0
    waves = -(-n_lists * chunks.n // slots)
    if longest >= 2048 and n_lists * longest / 64 > slots:
        assert n_lists * chunks.n / (waves * slots) > 0.6


def test_one_long_head_is_cut_as_if_it_were_alone():
    alone = choose_chunks(1, 131072, 131072, 64, 264)
    beside_short_ones = choose_chunks(8, 131072, 131072 + 7 * 320, 64, 264)
    assert beside_short_ones.tokens <= 1.2 * alone.tokens


@pytest.mark.parametrize("longest", [0, 1, 63, 512, 2048, 8192, 131072])
@pytest.mark.parametrize("n_lists", [1, 2, 8, 16, 24, 32, 64, 66, 67, 300])
def test_clusters_cover_the_lists_and_find_room(n_lists, longest):
    chunks = cluster_chunks(n_lists, longest, 64, 132)
    if chunks is None:
        assert n_lists > 132 or longest > 512
        return
    assert chunks.tokens % 64 == 0
    assert longest <= chunks.n * chunks.tokens
    assert n_lists * chunks.n <= 132


def test_clusters_are_as_large_as_find_room():
    assert [cluster_chunks(8 * batch, 2048, 64, 132) for batch in (1, 2, 3, 4, 8, 16, 17)] == [
        Chunks(8, 256), Chunks(4, 512), Chunks(4, 512), Chunks(2, 1024), Chunks(1, 2048), Chunks(1, 2048), None,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def interpreted():
    return under_interpreter(Path(__file__))


@pytest.mark.parametrize("name", RUNS)
def test_interpreted_kernel_equals_float64(interpreted, name):
    for found in interpreted[name]:
        expect_close(found, RUNS[name][1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", cases.LARGE, ids=by_name)
def test_kernel_on_a_gpu_equals_float64(poison, case, dtype):
    q, k, v, lists = cases.make(case, dtype, "cuda", seed=1)
    expect_close(errors(sparse_decode(q, k, v, lists), expected_of(q, k, v, lists)), dtype)


def of_hopper(case):
    return case.dim in (64, 128) and case.queries == 1 and case.heads // case.kv_heads <= 8


@pytest.mark.gpu
@pytest.mark.parametrize("programs", [1, 2, 4, 8])
@pytest.mark.parametrize("case", list(filter(of_hopper, cases.LARGE)), ids=by_name)
def test_clusters_equal_float64(poison, case, programs):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper device")
    from prunekit_kernels.sparse_decode import hopper_launch

    dtype = DTYPES[1 + (case.tokens + programs) % 2]
    q, k, v, lists = cases.make(case, dtype, "cuda", seed=programs)
    chunks = Chunks(programs, 64 * -(-lists.longest // (64 * programs)))
    where = (lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged)
    found = hopper_launch.launch(q, k, v, *where, chunks, case.dim**-0.5)
    expect_close(errors(found, expected_of(q, k, v, lists)), dtype)


@pytest.mark.gpu
def test_which_steps_clusters_take():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no Hopper device")

    def taken(case):
        q, k, v, lists = cases.make(case, torch.bfloat16, "cuda", seed=1)
        return hopper_chunks(q, k, v, case.kv_heads, lists.page_tokens, lists.paged, lists.longest)

    assert taken(cases.Case(8, 32, 8, 2048, 128, 16, "all")) == Chunks(1, 2048)
    assert taken(cases.Case(1, 32, 8, 2048, 128, 16, "all", "paged")) == Chunks(8, 256)
    assert taken(cases.Case(1, 32, 8, 2048, 256, 16, "all")) is None
    assert taken(cases.Case(1, 32, 8, 2048, 128, 16, "all", queries=2)) is None
    assert taken(cases.Case(1, 32, 2, 2048, 128, 16, "all")) is None


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1000, 20000])
def test_a_captured_step_follows_its_lists(tokens):
    q, k, v, lists = cases.make(cases.Case(2, 8, 2, tokens, 128, 16, "all"), torch.bfloat16, "cuda", seed=1)
    sparse_decode(q, k, v, lists)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = sparse_decode(q, k, v, lists)
    lists.tokens.copy_(torch.tensor([[tokens, 0], [16, 777]]))
    graph.replay()
    expected, sums = sparse_decode(q, k, v, lists)
    assert torch.equal(out, expected)
    assert torch.equal(lse, sums)


def interpret(case, dtype, seed):
    """Errors of the kernel with the chunks it chooses and, in float32, with one chunk and with short ones."""
    from prunekit_kernels.sparse_decode import portable

    q, k, v, lists = cases.make(case, dtype, "cpu", seed)
    step = portable.default_tile(case.dim).keys
    steps = -(-lists.longest // step)
    found, expected = [], expected_of(q, k, v, lists)
    short = Chunks(steps, step) if steps < 8 else Chunks(-(-steps // 2), 2 * step)
    for chunks in (None, Chunks(1, steps * step), short) if dtype == torch.float32 else (None,):
        got = portable.launch(
            q, k, v, lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged, lists.longest,
            lists.total, case.dim**-0.5, chunks=chunks,
        )  # fmt: skip
        found.append(errors(got, expected))
    return found


if __name__ == "__main__":
    on_one_thread_and_poisoned()
    print(json.dumps({name: interpret(*run) for name, run in RUNS.items()}))
