"""Block-sparse prefill: the reference against plain softmax, the kernel against the reference."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from prunekit_kernels import _device
from prunekit_kernels.block_sparse_prefill import block_sparse_prefill, cases, refusal
from prunekit_kernels.block_sparse_prefill.lists import pack_bits, unpack_bits
from prunekit_kernels.block_sparse_prefill.reference import reference
from tests.kernels.compare import errors, expect_close
from tests.kernels.interpreter import under_interpreter


def by_name(case):
    return case.name


@pytest.mark.parametrize("masks", [3, 0])
def test_bits_come_back(masks):
    mask = torch.rand(masks, 5, 96, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask)), mask)


@pytest.mark.parametrize("case", [c for c in cases.SMALL if not c.spans], ids=by_name)
def test_reference_equals_softmax_under_the_dense_mask(case):
    q, k, v, lists, _, _ = cases.make(case, torch.float64, "cpu", seed=3)
    group = case.heads // case.kv_heads
    mask = lists.dense().expand(case.heads, -1, -1)
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) / math.sqrt(case.dim)
    scores = scores.masked_fill(~mask, float("-inf"))
    out, lse = block_sparse_prefill(q, k, v, lists)
    torch.testing.assert_close(out, scores.softmax(-1) @ v.repeat_interleave(group, 1))
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())


def test_reference_over_all_blocks_equals_plain_attention():
    case = cases.Case(2, 4, 2, 70, 70, 64, block_q=32, block_k=32)
    q, k, v, _, _, _ = cases.make(case, torch.float32, "cpu", seed=0)
    lists = cases.lists_of(torch.ones(70, 70, dtype=torch.bool).tril()[None], case)
    expected = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(block_sparse_prefill(q, k, v, lists)[0], expected)


def test_sequences_in_a_padded_batch_equal_each_on_its_own():
    case = cases.Case(1, 2, 1, 50, 50, 64, block_q=32, block_k=32)
    q, k, v, lists, _, _ = cases.make(case, torch.float32, "cpu", seed=5)
    alone, sums = block_sparse_prefill(q, k, v, lists)
    wide = [torch.nn.functional.pad(t, (0, 0, 13, 7), value=float("nan")) for t in (q, k, v)]
    larger = cases.Case(1, 2, 1, 70, 70, 64, block_q=32, block_k=32)
    mask = torch.zeros(1, 70, 70, dtype=torch.bool)
    mask[:, :50, :50] = lists.dense()
    starts, ends = torch.tensor([13], dtype=torch.int32), torch.tensor([63], dtype=torch.int32)
    out, lse = block_sparse_prefill(*wide, cases.lists_of(mask, larger), starts=starts, ends=ends)
    torch.testing.assert_close(out[:, :, 13:63], alone)
    torch.testing.assert_close(lse[:, :, 13:63], sums)
    assert (out[:, :, :13] == 0).all()
    assert (lse[:, :, 63:] == float("-inf")).all()


def test_operation_has_a_fake_that_agrees():
    case = cases.SMALL[2]
    q, k, v, lists, _, _ = cases.make(case, torch.float32, "cpu", seed=0)
    arguments = (
        q.contiguous(), k, v, lists.counts, lists.partials, lists.indices, None, None, None, None,
        32, 32, lists.q_offset, True, True, 0.1,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor")
    results = torch.library.opcheck(torch.ops.prunekit.block_sparse_prefill.default, arguments, test_utils=checks)
    assert set(results.values()) == {"SUCCESS"}


def test_lists_of_another_length_are_refused():
    case = cases.SMALL[0]
    q, k, v, lists, _, _ = cases.make(case, torch.float32, "cpu", seed=0)
    with pytest.raises(ValueError, match="lists for 63 queries"):
        block_sparse_prefill(q[:, :, :60], k, v, lists)
    with pytest.raises(ValueError, match="go together"):
        block_sparse_prefill(q, k, v, lists, starts=torch.zeros(2, dtype=torch.int32))


def on_gpu(dim, dtype=torch.bfloat16, heads=4):
    """What `refusal` looks at, of tensors on a device that need not be there."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, heads, 8, dim))


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_every_head_size_that_the_kernels_are_built_for_is_taken(monkeypatch, dim):
    monkeypatch.setattr(_device, "_has_triton", lambda: True)
    assert refusal(on_gpu(dim), on_gpu(dim, heads=2)) == ""


def test_refusal_names_the_reason(monkeypatch):
    q = torch.empty(1, 4, 8, 72, device="meta")
    assert "`meta`" in refusal(q, q)
    monkeypatch.setattr(_device, "_has_triton", lambda: True)
    assert refusal(on_gpu(72), on_gpu(72)) == "head size 72 is not one of 64, 80, 96, 128, 256"
    assert refusal(on_gpu(64, torch.float32), on_gpu(64)) == "dtype torch.float32 is not one of bfloat16, float16"
    wrong = "4 query heads are not a multiple of 3 key-value heads"
    assert refusal(on_gpu(64), on_gpu(64, heads=3)) == wrong
    monkeypatch.setattr(_device, "_has_triton", lambda: False)
    assert refusal(on_gpu(64), on_gpu(64)) == "triton is not installed"


@pytest.fixture(scope="module")
def interpreted():
    return under_interpreter(Path(__file__).parent / "interpret_prefill.py")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", cases.SMALL, ids=by_name)
def test_interpreted_kernel_equals_float64(interpreted, case, dtype):
    for found in interpreted["cases"][f"{case.name}-{dtype}"]:
        expect_close(found, dtype)


def test_interpreted_kernel_gives_zeros_for_a_query_without_keys(interpreted):
    assert interpreted["keyless"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.LARGE, ids=by_name)
def test_kernel_on_a_gpu_equals_float64(poison, case):
    q, k, v, lists, starts, ends = cases.make(case, torch.bfloat16, "cuda", seed=1)
    got = block_sparse_prefill(q, k, v, lists, starts=starts, ends=ends)
    expected = reference(q.double(), k.double(), v.double(), lists, case.dim**-0.5, starts, ends)
    expect_close(errors(got, expected), torch.bfloat16)
