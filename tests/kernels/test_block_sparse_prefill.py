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
from tests.kernels import prefill
from tests.kernels.compare import GRADIENT, errors, expect_close
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


def dense_gated(q, k, v, lists, gates, free):
    """Attention under a gate on each key, from the matrix itself."""
    group = q.shape[1] // k.shape[1]
    far = lists.q_offset + torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2]) >= free
    bias = torch.where(far, gates.repeat_interleave(group, 1)[:, :, None, :], 0.0)
    scores = q @ k.repeat_interleave(group, 1).transpose(2, 3) * q.shape[-1] ** -0.5 + bias
    scores = scores.masked_fill(~lists.dense(), float("-inf"))
    return scores.softmax(-1) @ v.repeat_interleave(group, 1), scores.logsumexp(-1)


@pytest.mark.parametrize("free", [1, 9])
def test_gates_and_their_gradients_equal_those_of_autograd(free):
    case = cases.Case(2, 4, 2, 50, 50, 64, block_q=32, block_k=32)
    q, k, v, lists, _, _ = cases.make(case, torch.float64, "cpu", seed=0)
    leaves = [t.detach().requires_grad_() for t in (q, k, v, prefill.gates_of(case))]
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = []
    for run in (
        lambda *t: block_sparse_prefill(*t[:3], lists, gates=t[3], free_tokens=free),
        lambda *t: dense_gated(*t[:3], lists, t[3].double(), free),
    ):
        out, lse = run(*leaves)
        grads.append((out, lse, *torch.autograd.grad((out * weight).sum() + lse.double().sum(), leaves)))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="do not fit keys"):
        block_sparse_prefill(q, k, v, lists, gates=leaves[3][:, :1])


def test_sequences_one_behind_another_equal_each_on_its_own():
    q, k, v, starts, ends, lists = prefill.varlen_inputs(torch.float64, "cpu", 32)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = block_sparse_prefill(*leaves, lists, starts=starts, ends=ends)
    mask = lists.dense()
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        n = end - start
        case = cases.Case(1, 4, 2, n, n, 64, block_q=32, block_k=32)
        alone = [t[:, :, start:end].detach().requires_grad_() for t in leaves]
        one, sums = block_sparse_prefill(*alone, cases.lists_of(mask[:, :n, :n], case))
        torch.testing.assert_close(out[:, :, start:end], one)
        torch.testing.assert_close(lse[:, :, start:end], sums)
        got = torch.autograd.grad(out[:, :, start:end].sum(), leaves, retain_graph=True)
        for whole, part in zip(got, torch.autograd.grad(one.sum(), alone), strict=True):
            torch.testing.assert_close(whole[:, :, start:end], part)
    with pytest.raises(ValueError, match="4 sequences do not fit a batch of 2"):
        block_sparse_prefill(*(t.expand(2, -1, -1, -1) for t in (q, k, v)), lists, starts=starts, ends=ends)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(prefill.GATED)))
def test_interpreted_gates(interpreted, number, dtype):
    expect_close(interpreted["gated"][f"{number}-{dtype}"], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_interpreted_varlen(interpreted, causal, per_head, dtype):
    *forward, dq, dk, dv = interpreted["varlen"][f"{dtype}-{per_head}-{causal}"]
    expect_close(forward, dtype)
    assert max(dq, dk, dv) <= GRADIENT[dtype]


def test_interpreted_keys_more_than_31_bits_away(interpreted):
    *forward, dq, dk, dv = interpreted["far"]
    expect_close(forward, torch.float16)
    assert max(dq, dk, dv) <= GRADIENT[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(prefill.WIDE)))
def test_interpreted_heads_of_256(interpreted, number, dtype):
    *forward, dq, dk, dv = interpreted["wide"][f"{number}-{dtype}"]
    expect_close(forward, dtype)
    assert max(dq, dk, dv) <= GRADIENT[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.LARGE, ids=by_name)
def test_kernel_on_a_gpu_equals_float64(poison, case):
    q, k, v, lists, starts, ends = cases.make(case, torch.bfloat16, "cuda", seed=1)
    got = block_sparse_prefill(q, k, v, lists, starts=starts, ends=ends)
    expected = reference(q.double(), k.double(), v.double(), lists, case.dim**-0.5, starts, ends)
    expect_close(errors(got, expected), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("spans", [False, True])
def test_sums_on_a_gpu_are_float32_whatever_the_default_is(spans):
    q, k, v, lists, starts, ends = cases.make(
        cases.Case(2, 4, 2, 256, 256, 128, spans=spans), torch.bfloat16, "cuda", seed=1
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert block_sparse_prefill(q, k, v, lists, starts=starts, ends=ends)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "free"), prefill.LARGE_GATED, ids=str)
def test_gates_on_a_gpu(poison, case, free):
    q, k, v, lists, starts, ends = cases.make(case, torch.bfloat16, "cuda", seed=1)
    gates = prefill.gates_of(case).cuda()
    got = block_sparse_prefill(q, k, v, lists, starts=starts, ends=ends, gates=gates, free_tokens=free)
    exact = [t.double() for t in (q, k, v)]
    expected = reference(*exact, lists, case.dim**-0.5, starts, ends, gates, free)
    expect_close(errors(got, expected), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_varlen_on_a_gpu(poison, dim):
    q, k, v, starts, ends, lists = prefill.varlen_inputs(
        torch.bfloat16, "cuda", 128, dim, (1000, 1, 256, 63, 257, 128), 8, 2
    )
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    got = block_sparse_prefill(*leaves, lists, starts=starts, ends=ends)
    expected = block_sparse_prefill(*exact, lists, starts=starts, ends=ends)
    expect_close(errors([t.detach() for t in got], [t.detach() for t in expected]), torch.bfloat16)
    grad = torch.randn_like(q)
    mine = torch.autograd.grad(got[0], leaves, grad)
    for a, b in zip(mine, torch.autograd.grad(expected[0], exact, grad.double()), strict=True):
        assert cases.relative_error(a, b) <= GRADIENT[torch.bfloat16]
