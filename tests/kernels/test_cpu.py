"""Block-sparse prefill and decode on a CPU against their references; the name of a random test has its seed."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from prunekit.runtime.attention.patterns._engine import block_lists
from prunekit.runtime.attention.patterns.block_topk import BlockTopk
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.dilated import Dilated
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.sink_window import SinkWindow
from prunekit.runtime.attention.patterns.streaming import Streaming
from prunekit_kernels import _cpu
from prunekit_kernels.block_sparse_prefill import block_sparse_prefill, cases, cpu
from prunekit_kernels.block_sparse_prefill.reference import reference
from prunekit_kernels.sparse_decode import PageLists, sparse_decode
from prunekit_kernels.sparse_decode.reference import decode_reference

PATTERNS = (Dense(), Power(128, 2), Streaming(128, 1, 2), SinkWindow(4, 300), Dilated(200, 3), BlockTopk(3))
INF = float("inf")


def draw(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def expect_same(got, expected, dtype=torch.float32):
    (out, lse), (right, sums) = got, expected
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    read = sums > -INF
    assert torch.equal(lse > -INF, read)
    assert (out[~read] == 0).all()
    assert cases.relative_error(out, right) <= (1e-14 if dtype == torch.float64 else cases.RELATIVE[dtype])
    torch.testing.assert_close(lse[read], sums[read], atol=cases.LSE_ABSOLUTE[torch.float32], rtol=1e-6)


def compared(dtype, q, k, v, lists, starts=None, ends=None, gates=None, free=0):
    q, k, v = (t.to(dtype) for t in (q, k, v))
    got = block_sparse_prefill(q, k, v, lists, starts=starts, ends=ends, gates=gates, free_tokens=free)
    wide = (t.double() for t in (q, k, v))
    expect_same(got, reference(*wide, lists, q.shape[-1] ** -0.5, starts, ends, gates, free), dtype)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", cases.SMALL, ids=lambda case: case.name)
def test_every_case_of_the_kernels_equals_the_reference(poison, case, dtype):
    q, k, v, lists, starts, ends = cases.make(case, dtype, "cpu", seed=2)
    compared(dtype, q, k, v, lists, starts, ends)


@pytest.mark.parametrize(
    ("n", "pattern"),
    [(n, pattern) for n in (63, 100, 1000) for pattern in PATTERNS]
    + [(4097, pattern) for pattern in (Power(128, 2), Dilated(200, 3), BlockTopk(3))],
    ids=str,
)
def test_ragged_prompts_equal_the_reference(poison, n, pattern):
    q, k, v = (draw(seed, 1, n, heads, 16).transpose(1, 2) for seed, heads in ((1, 2), (2, 1), (3, 1)))
    lists = pattern.prompt_lists(q, k, 0.25) if isinstance(pattern, BlockTopk) else block_lists(pattern, n, n)
    compared(torch.float32, q, k, v, lists)


@pytest.mark.parametrize("seed", range(300, 324))
def test_random_shapes_equal_the_reference_in_float64(seed):
    random = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (1,), generator=random))]

    kv_heads, group, behind = pick(1, 2, 3), pick(1, 2, 3), pick(0, 0, 3)
    keys = int(torch.randint(1, 300, (1,), generator=random))
    spans = not behind and pick(True, False)
    queries = keys if spans or behind else int(torch.randint(1, keys + 1, (1,), generator=random))
    case = cases.Case(
        1 if behind else pick(1, 2), kv_heads * group, kv_heads, queries, keys, pick(8, 17, 64),
        causal=pick(True, False), per_head=pick(True, False), table=pick(True, False), spans=spans,
        block_q=pick(16, 32, 128), block_k=pick(32, 64, 128),
    )  # fmt: skip
    q, k, v, lists, starts, ends = cases.make(case, torch.float64, "cpu", seed)
    if behind:
        # Sequences one behind another, the first of which the lists are for.
        starts = torch.tensor([0, keys, keys + keys // 2], dtype=torch.int32)
        ends = torch.tensor([keys, keys + keys // 2, keys + keys // 2 + keys // 3], dtype=torch.int32)
        q, k, v = (draw(seed + n, *t.shape[:2], 2 * keys, t.shape[3], dtype=t.dtype) for n, t in enumerate((q, k, v)))
    if pick(True, False):
        lists = replace(lists, biases=torch.randn(lists.indices.shape, generator=random))
    gates = torch.randn(k.shape[:3], generator=random) if pick(True, False) else None
    if gates is not None:
        gates = gates.masked_fill(torch.rand(gates.shape, generator=random) < 0.5, -INF)
    compared(torch.float64, q, k, v, lists, starts, ends, gates, pick(0, 5, 70))


def test_blocks_that_no_list_names_are_not_looked_at():
    n, lists = 1000, block_lists(Streaming(128, 1, 2), 1000, 1000)
    q, k, v = draw(1, 1, 4, n, 64), draw(2, 1, 2, n, 64), draw(3, 1, 2, n, 64)
    # The last row alone: it reads the first block and the last two.
    one = replace(lists, counts=lists.counts.clone(), partials=lists.partials.clone())
    one.counts[:, :-1] = one.partials[:, :-1] = 0
    right = block_sparse_prefill(q, k, v, one)
    for tensor in (k, v):
        tensor[:, :, 128:768] = float("nan")
    out, lse = block_sparse_prefill(q, k, v, one)
    assert torch.equal(out, right[0])
    assert torch.equal(lse, right[1])
    assert (out[:, :, :896] == 0).all()
    assert (lse[:, :, :896] == -INF).all()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("table", [False, True])
def test_a_sequence_may_end_inside_a_block_that_is_full_for_a_longer_one(table, per_head):
    case = cases.Case(2, 4, 2, 130, 130, 32, causal=False, per_head=per_head, table=table, block_q=32, block_k=32)
    mask = torch.ones(4 if per_head else 1, 130, 130, dtype=torch.bool)
    mask[:, :, 32:64] = False
    mask[:, 64:, 64:96] &= draw(9, 66, 32) > 0 if table else False
    q, k, v = draw(1, 2, 4, 130, 32), draw(2, 2, 2, 130, 32), draw(3, 2, 2, 130, 32)
    starts, ends = torch.tensor([0, 7], dtype=torch.int32), torch.tensor([115, 130], dtype=torch.int32)
    compared(torch.float32, q, k, v, cases.lists_of(mask, case), starts, ends)


def test_queries_whose_keys_are_all_closed_give_zeros_and_minus_infinity():
    lists = block_lists(Power(16, 2), 96, 96, block_q=32, block_k=32)
    gates = torch.zeros(1, 2, 96)
    gates[:, :, :40] = -INF
    q, k, v = draw(1, 1, 4, 96, 32), draw(2, 1, 2, 96, 32), draw(3, 1, 2, 96, 32)
    out, lse = compared(torch.float32, q, k, v, lists, gates=gates)
    assert (lse[:, :, :40] == -INF).all()
    assert (out[:, :, :40] == 0).all()
    assert lse[:, :, 40:].isfinite().all()


@pytest.mark.parametrize("pattern", [Dense(), Dense(causal=False), Streaming(128, 1, 9)], ids=str)
@pytest.mark.parametrize("spans", [False, True])
def test_lists_of_dense_attention_gather_nothing(monkeypatch, pattern, spans):
    monkeypatch.setattr(cpu, "_sparse", None)
    n, starts, ends = 300, None, None
    q, k, v = draw(1, 2, 6, n, 32), draw(2, 2, 2, n, 32), draw(3, 2, 2, n, 32)
    if spans:
        starts, ends = torch.tensor([0, 130], dtype=torch.int32), torch.tensor([300, 290], dtype=torch.int32)
    out, _ = compared(torch.float32, q, k, v, block_lists(pattern, n, n), starts, ends)
    expected = scaled_dot_product_attention(q, k, v, is_causal=pattern.causal, enable_gqa=True)
    torch.testing.assert_close(out[0], expected[0])


@pytest.mark.parametrize("causal", [True, False])
def test_a_dense_prompt_over_a_cache_reads_the_cache(causal):
    q, k, v = draw(1, 1, 2, 100, 32), draw(2, 1, 1, 333, 32), draw(3, 1, 1, 333, 32)
    compared(torch.float32, q, k, v, block_lists(Dense(causal), 100, 333, 233))


def test_few_blocks_at_a_time_give_the_same(monkeypatch):
    case = cases.Case(1, 4, 2, 1000, 1000, 32, per_head=True)
    q, k, v, lists, _, _ = cases.make(case, torch.float32, "cpu", seed=4)
    whole = block_sparse_prefill(q, k, v, lists)
    monkeypatch.setattr(cpu, "CHUNK_BYTES", 1)
    for a, b in zip(block_sparse_prefill(q, k, v, lists), whole, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("queries", [1, 3])
def test_decode_reads_pages_in_a_row_in_place(queries):
    q, k, v = draw(1, 2, 6, queries, 32), draw(2, 2, 3, 200, 32), draw(3, 2, 3, 200, 32)
    k[:, :, :32] = v[:, :, 180:] = float("nan")
    pages = [[torch.arange(2, 12)] * 3, [torch.arange(4, 9), torch.arange(2, 3), torch.tensor([5, 3, 7])]]
    tokens = torch.tensor([[148, 148, 148], [80, 0, 44]])
    lists = PageLists.from_lists(pages, 16, paged=False, tokens=tokens)
    got = sparse_decode(q, k, v, lists)
    arguments = (lists.indices, lists.starts, lists.tokens, lists.page_tokens, lists.paged, 32**-0.5)
    expect_same(got, decode_reference(*(t.double() for t in (q, k, v)), *arguments))


@pytest.mark.parametrize("name", ["no_such_attention", "_scaled_dot_product_attention_math"])
def test_a_torch_without_the_operation_as_known_runs_the_references(monkeypatch, name):
    q, k, v = draw(1, 1, 4, 96, 32), draw(2, 1, 2, 96, 32), draw(3, 1, 2, 96, 32)
    blocks = block_lists(Power(16, 2), 96, 96, block_q=32, block_k=32)
    pages = PageLists.whole(torch.tensor([[90, 70]]), 96)
    expected = [*block_sparse_prefill(q, k, v, blocks), *sparse_decode(q[:, :, :2], k, v, pages)]
    monkeypatch.setattr(_cpu, "FLASH", name)
    monkeypatch.setattr(_cpu, "flash", None)
    _cpu.has_flash.cache_clear()
    with pytest.warns(UserWarning, match=f"has no `{name}` as known") as said:
        got = [*block_sparse_prefill(q, k, v, blocks), *sparse_decode(q[:, :, :2], k, v, pages)]
    _cpu.has_flash.cache_clear()
    assert len(said) == 1
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("pattern", [Dense(), Power(16, 2)], ids=str)
def test_sequences_without_tokens_read_nothing_and_are_no_error(pattern):
    lists = block_lists(pattern, 96, 96, block_q=32, block_k=32)
    starts, ends = (torch.tensor(t, dtype=torch.int32) for t in ([0, 10, 10, 50], [10, 10, 50, 50]))
    q, k, v = draw(1, 1, 4, 96, 32), draw(2, 1, 2, 96, 32), draw(3, 1, 2, 96, 32)
    _, lse = compared(torch.float32, q, k, v, lists, starts, ends)
    assert lse[:, :, :50].isfinite().all()
    assert (lse[:, :, 50:] == -INF).all()


def test_a_step_of_no_sequence_is_no_error():
    lists = PageLists.whole(torch.zeros(0, 2, dtype=torch.int32), 10)
    out, lse = sparse_decode(draw(1, 0, 4, 1, 16), draw(2, 0, 2, 10, 16), draw(3, 0, 2, 10, 16), lists)
    assert out.shape == (0, 4, 1, 16)
    assert lse.shape == (0, 4, 1)


@pytest.mark.parametrize("name", ["block_sparse_prefill", "sparse_decode"])
@pytest.mark.parametrize("device", ["CPU", "CUDA", "MPS", "XPU"])
def test_every_device_runs_something(name, device):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"prunekit::{name}", device)
