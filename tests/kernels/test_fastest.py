"""flash-attn-4 as a peer: taken where it is right and was measured faster, and only there."""

import sys
import types

import pytest
import torch

from prunekit_kernels.block_sparse_prefill import block_sparse_prefill, cases, fastest, flash4

CASE = cases.Case(1, 2, 1, 300, 300, 64)


class Fake:
    """A peer that computes the same with a factor, in a given time."""

    NAME = "fake"

    def __init__(self, factor=1.0, reason="", fails=False):
        self.factor, self.reason, self.fails, self.calls = factor, reason, fails, 0

    def refusal(self, q, k, lists):
        return self.reason

    def run(self, q, k, v, lists, scale):
        self.calls += 1
        if self.fails:
            raise TypeError("unexpected keyword")
        return block_sparse_prefill(q, k, v, lists, scale=scale)[0] * self.factor


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.setattr(fastest, "_CHOSEN", {})
    q, k, v, lists, _, _ = cases.make(CASE, torch.float32, "cpu", seed=0)
    return q, k, v, lists


@pytest.mark.parametrize(("theirs", "own", "calls"), [(1.0, 2.0, 3), (2.0, 1.0, 1)], ids=["faster", "slower"])
def test_the_faster_one_runs_and_is_measured_once(inputs, monkeypatch, theirs, own, calls):
    times, peer = iter([theirs, own]), Fake()
    monkeypatch.setattr(fastest, "milliseconds", lambda run, cuda: next(times))
    expected = block_sparse_prefill(*inputs)[0]
    for _ in range(2):
        assert torch.equal(fastest.prefill_fastest(*inputs, peer=peer), expected)
    # One call to compare, then one for each time it was wanted.
    assert peer.calls == calls


@pytest.mark.parametrize(
    ("peer", "said"), [(Fake(1.5), "output is 5.0e-01 off"), (Fake(fails=True), "TypeError: unexpected keyword")]
)
def test_a_peer_that_is_wrong_or_fails_is_left_out(inputs, peer, said):
    expected = block_sparse_prefill(*inputs)[0]
    with pytest.warns(UserWarning, match=f"fake is left out: .*{said}"):
        assert torch.equal(fastest.prefill_fastest(*inputs, peer=peer), expected)
    assert torch.equal(fastest.prefill_fastest(*inputs, peer=peer), expected)
    assert peer.calls == 1


def test_a_peer_that_does_not_take_the_case_is_not_run(inputs):
    peer = Fake(reason="not for this")
    fastest.prefill_fastest(*inputs, peer=peer)
    assert peer.calls == 0
    assert fastest._CHOSEN == {}


def test_times_are_medians_of_calls(monkeypatch):
    times = iter([5.0, 1.0, 9.0, 2.0, 3.0])
    monkeypatch.setattr(fastest, "elapsed_ms", lambda run, cuda: next(times))
    assert fastest.milliseconds(lambda: None, False) == 3.0


def test_cases_that_flash_attn_4_does_not_take_are_named():
    q, k, _, lists, _, _ = cases.make(CASE, torch.bfloat16, "cpu", seed=0)
    assert flash4.case_refusal(q, k, lists) == ""
    assert "`cpu`" in flash4.refusal(q, k, lists)
    assert "head size 96" in flash4.case_refusal(
        *cases.make(cases.Case(1, 1, 1, 9, 9, 96), q.dtype, "cpu", 0)[:2], lists
    )
    small = cases.make(cases.Case(1, 1, 1, 64, 64, 64, block_q=32, block_k=32), q.dtype, "cpu", 0)
    assert "blocks of 128" in flash4.case_refusal(small[0], small[1], small[3])
    offset = cases.make(cases.Case(1, 1, 1, 64, 200, 64), q.dtype, "cpu", 0)
    assert "whole causal prompt" in flash4.case_refusal(offset[0], offset[1], offset[3])
    assert "gradients" in flash4.case_refusal(q.clone().requires_grad_(), k, lists)


def test_lists_reach_flash_attn_4_as_it_takes_them(monkeypatch):
    """A stand-in for its interface that computes from what it is given, the mask function included."""

    def attend(q, k, v, softmax_scale, mask_mod, block_sparse_tensors):
        s = block_sparse_tensors
        assert s.block_size == (128, 128)
        n, heads = q.shape[1], q.shape[2]
        seen = torch.zeros(heads, 512, 512, dtype=torch.bool)
        at = torch.arange(512)
        causal = mask_mod(0, 0, at[:, None], at[None, :], None, None)
        for h in range(heads):
            for row in range(s.mask_block_cnt.shape[-1]):
                rows = slice(row * 128, row * 128 + 128)
                g = min(h, s.mask_block_cnt.shape[1] - 1)
                for slot in range(int(s.mask_block_cnt[0, g, row])):
                    c = int(s.mask_block_idx[0, g, row, slot])
                    seen[h, rows, c * 128 : c * 128 + 128] = causal[rows, c * 128 : c * 128 + 128]
                for slot in range(int(s.full_block_cnt[0, g, row])):
                    c = int(s.full_block_idx[0, g, row, slot])
                    seen[h, rows, c * 128 : c * 128 + 128] = True
        wide_k, wide_v = (t.repeat_interleave(heads // t.shape[2], 2) for t in (k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, wide_k) * softmax_scale
        weights = scores.masked_fill(~seen[None, :, :n, :n], float("-inf")).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, wide_v), None

    class Tensors:
        def __init__(self, mask_block_cnt, mask_block_idx, full_block_cnt, full_block_idx, block_size):
            self.mask_block_cnt, self.mask_block_idx = mask_block_cnt, mask_block_idx
            self.full_block_cnt, self.full_block_idx, self.block_size = full_block_cnt, full_block_idx, block_size

    modules = {
        "cutlass": types.ModuleType("cutlass"),
        "cutlass.cute": types.ModuleType("cutlass.cute"),
        "flash_attn": types.ModuleType("flash_attn"),
        "flash_attn.cute": types.ModuleType("flash_attn.cute"),
        "flash_attn.cute.block_sparsity": types.ModuleType("flash_attn.cute.block_sparsity"),
    }
    modules["cutlass"].cute = modules["cutlass.cute"]
    modules["cutlass.cute"].jit = lambda function: function
    modules["flash_attn.cute"].flash_attn_func = attend
    modules["flash_attn.cute.block_sparsity"].BlockSparseTensorsTorch = Tensors
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    for per_head in (False, True):
        case = cases.Case(1, 4, 2, 300, 300, 64, per_head=per_head)
        q, k, v, lists, _, _ = cases.make(case, torch.float64, "cpu", seed=0)
        got = flash4.run(q, k, v, lists, 0.1)
        torch.testing.assert_close(got, block_sparse_prefill(q, k, v, lists, scale=0.1)[0])


@pytest.mark.gpu
def test_flash_attn_4_itself_agrees_where_it_is_installed():
    q, k, v, lists, _, _ = cases.make(cases.Case(1, 8, 2, 4097, 4097, 128), torch.bfloat16, "cuda", seed=0)
    if reason := flash4.refusal(q, k, lists):
        pytest.skip(reason)
    expected = block_sparse_prefill(q, k, v, lists)[0]
    assert cases.relative_error(flash4.run(q, k, v, lists, 128**-0.5), expected) <= 2 * cases.RELATIVE[torch.bfloat16]
