"""Column statistics and cache compaction: references first, kernels against them."""

from pathlib import Path

import pytest
import torch

from prunekit_kernels.block_sparse_prefill import block_sparse_prefill, cases
from prunekit_kernels.cache_compact import cache_compact
from prunekit_kernels.column_stats import column_stats
from prunekit_kernels.sparse_decode import PageLists, sparse_decode
from prunekit_kernels.sparse_decode import cases as decode
from tests.kernels import eviction
from tests.kernels.interpreter import under_interpreter

TYPES = (torch.float32, torch.bfloat16)
# Probabilities from a float32 log-sum-exp: the products round as in attention, sums of probabilities do not.
STATS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}


@pytest.fixture(scope="session")
def interpreted():
    return under_interpreter(Path(__file__).parent / "interpret_eviction.py")


@pytest.mark.parametrize("shape", eviction.STATS, ids=str)
def test_column_statistics_are_those_of_the_attention_matrix(shape):
    q, k, lse, starts, ends, offset, causal, scale, weights = eviction.stats_inputs(shape, torch.float64, "cpu")
    sums, most = column_stats(q, k, lse, causal=causal, starts=starts, ends=ends)
    # The log-sum-exp that comes in is float32.
    torch.testing.assert_close(sums.double(), weights.sum(2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(most.double(), weights.amax(2), rtol=1e-5, atol=1e-6)
    again = column_stats(q, k, lse, q_offset=offset, causal=causal, scale=scale, starts=starts, ends=ends)
    assert torch.equal(again[0], sums)


def test_columns_of_all_queries_sum_to_their_number():
    case = cases.Case(1, 4, 2, 70, 70, 64, block_q=32, block_k=32)
    q, k, v, _, _, _ = cases.make(case, torch.float32, "cpu", seed=0)
    lists = cases.lists_of(torch.ones(1, 70, 70, dtype=torch.bool).tril(), case)
    _, lse = block_sparse_prefill(q, k, v, lists)
    sums, most = column_stats(q, k, lse)
    torch.testing.assert_close(sums.sum(-1), torch.full((1, 4), 70.0))
    assert most.max() <= 1.0 + 1e-5
    with pytest.raises(ValueError, match="do not fit each other"):
        column_stats(q, k, lse[:, :, :3])
    with pytest.raises(ValueError, match="go together"):
        column_stats(q, k, lse, starts=torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("page", [1, 16])
@pytest.mark.parametrize("case", decode.SMALL, ids=lambda case: case.name)
def test_a_compacted_cache_is_read_as_the_old_one_was(case, page):
    q, k, v, lists = decode.make(case, torch.float32, "cpu", seed=2)
    made = cache_compact(k, v, lists, page_tokens=page)
    got, sums = sparse_decode(q, made.k, made.v, made.lists)
    expected, old = sparse_decode(q, k, v, lists)
    assert torch.equal(got, expected)
    assert torch.equal(sums, old)
    assert made.k.shape[0] == int(((lists.tokens + page - 1) // page).sum())
    assert torch.isfinite(made.k).all()


def test_compaction_frees_what_no_head_keeps():
    k, v = torch.randn(1, 2, 64, 8), torch.randn(1, 2, 64, 8)
    mask = torch.zeros(1, 2, 64, dtype=torch.bool)
    mask[0, 0, [3, 60]] = True
    mask[0, 1, 5] = True
    made = cache_compact(k, v, PageLists.from_mask(mask, 2), page_tokens=2)
    assert made.k.numel() * 32 == k.numel()
    assert torch.equal(made.k[:, :, 0], torch.stack([k[0, 0, [3, 60]], torch.stack([k[0, 1, 5], torch.zeros(8)])]))
    with pytest.raises(ValueError, match="do not fit lists of 1 x 2"):
        cache_compact(k[:, :1], v[:, :1], PageLists.from_mask(mask, 2))


def test_operations_pass_the_checks_of_torch():
    q, k, lse, starts, ends, offset, causal, scale, _ = eviction.stats_inputs(eviction.STATS[0], torch.float32, "cpu")
    checks = ("test_schema", "test_faketensor")
    arguments = (q.contiguous(), k.contiguous(), lse, starts, ends, offset, causal, scale)
    done = torch.library.opcheck(torch.ops.prunekit.column_stats.default, arguments, test_utils=checks)
    assert set(done.values()) == {"SUCCESS"}
    _, k, v, lists = decode.make(decode.SMALL[0], torch.float32, "cpu", seed=1)
    pages = torch.zeros_like(lists.starts)
    tail = (lists.page_tokens, lists.paged, 16, int(lists.tokens.sum()), lists.longest)
    arguments = (k.nan_to_num(), v.nan_to_num(), lists.indices, lists.starts, lists.tokens, pages, *tail)
    done = torch.library.opcheck(torch.ops.prunekit.cache_compact.default, arguments, test_utils=checks)
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("number", range(len(eviction.STATS)))
def test_interpreted_column_statistics(interpreted, number, dtype):
    assert max(interpreted["stats"][f"{number}-{dtype}"]) <= STATS[dtype]


@pytest.mark.parametrize("case", decode.SMALL, ids=lambda case: case.name)
def test_interpreted_compaction(interpreted, case):
    assert all(interpreted["compacted"][case.name])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", eviction.LARGE_STATS, ids=str)
def test_column_statistics_on_a_gpu(poison, shape):
    q, k, lse, starts, ends, offset, causal, scale, weights = eviction.stats_inputs(shape, torch.bfloat16, "cuda")
    sums, most = column_stats(q, k, lse, q_offset=offset, causal=causal, scale=scale, starts=starts, ends=ends)
    assert cases.relative_error(sums, weights.sum(2)) <= STATS[torch.bfloat16]
    assert cases.relative_error(most, weights.amax(2)) <= STATS[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("page", [1, 16, 64])
@pytest.mark.parametrize("case", decode.LARGE, ids=lambda case: case.name)
def test_compaction_on_a_gpu(poison, case, page):
    q, k, v, lists = decode.make(case, torch.bfloat16, "cuda", seed=1)
    made = cache_compact(k, v, lists, page_tokens=page)
    on_cpu = cache_compact(k.cpu(), v.cpu(), lists.to("cpu"), page_tokens=page)
    assert torch.equal(made.k.cpu(), on_cpu.k)
    assert torch.equal(made.v.cpu(), on_cpu.v)
    got, _ = sparse_decode(q, made.k, made.v, made.lists)
    assert decode.relative_error(got, sparse_decode(q, k, v, lists)[0]) <= decode.RELATIVE[torch.bfloat16]
