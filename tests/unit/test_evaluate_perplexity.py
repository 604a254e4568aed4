"""Perplexity against the plain loss, in chunks and whole."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prunekit.core.errors import EvaluationError
from prunekit.evaluate import logits as module
from prunekit.evaluate.perplexity import perplexity, sliding_windows

IDS = torch.randint(0, 97, (5, 23), generator=torch.Generator().manual_seed(0))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def plain(model: Any, ids: Tensor) -> float:
    """Mean negative log-likelihood of every token but the first, in float64, one window after the other."""
    losses = []
    with torch.no_grad():
        for window in ids:
            logs = model(window[None]).logits[0].double().log_softmax(-1)
            losses += [-float(logs[i, window[i + 1]]) for i in range(len(window) - 1)]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_perplexity_equals_the_plain_reference(build: Any, batch_size: int) -> None:
    model = build()
    found = perplexity(model, IDS, batch_size=batch_size)
    assert found.tokens == 5 * 22
    assert found.nll == pytest.approx(plain(model, IDS), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.nll))


def test_logits_are_made_a_few_positions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = llama(), []
    expected = perplexity(model, IDS)
    monkeypatch.setattr(module, "_LOGIT_BYTES", 4 * 97 * 9)
    model.lm_head.register_forward_hook(lambda m, inputs, output: rows.append(output[..., 0].numel()))
    assert perplexity(model, IDS, batch_size=5).nll == pytest.approx(expected.nll, rel=1e-6)
    assert max(rows) == 9


def test_models_that_change_their_logits_give_the_changed_ones() -> None:
    class Capped(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 2.0 * torch.tanh(4.0 * output.logits)
            return output

    model = Capped(llama().config).eval()
    assert perplexity(model, IDS).nll == pytest.approx(plain(model, IDS), rel=1e-6)


@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(40, 12, 5), (40, 12, 11), (37, 12, 1), (9, 12, 5), (13, 12, 5)]
)
def test_sliding_windows_score_every_token_once_with_the_context_they_promise(
    tokens: int, length: int, stride: int
) -> None:
    model, text = llama(), torch.randint(0, 97, (tokens,), generator=torch.Generator().manual_seed(1))
    windows, scored = sliding_windows(text, length, stride)
    assert int(scored.sum()) == tokens - 1
    found = perplexity(model, windows, batch_size=3, scored=scored)
    expected, reached, start = 0.0, 1, 0
    while reached < tokens:
        end = min(start + length, tokens)
        first = max(0, end - length)
        with torch.no_grad():
            logs = model(text[None, first:end]).logits[0].double().log_softmax(-1)
        expected -= sum(float(logs[i - 1 - first, text[i]]) for i in range(reached, end))
        reached, start = end, start + stride
    assert found.nll == pytest.approx(expected / (tokens - 1), rel=1e-6)
    assert found.window_tokens == tuple(scored.tolist())


def test_windows_that_do_not_overlap_give_the_default_figure() -> None:
    model = llama()
    whole = perplexity(model, IDS, scored=torch.full((5,), 22))
    assert whole == perplexity(model, IDS)
    assert sum(whole.window_nll) / sum(whole.window_tokens) == whole.nll


def test_first_token_of_a_window_is_not_scored() -> None:
    model = llama()
    with torch.no_grad():
        logs = model(IDS[:1, :2]).logits[0, 0].log_softmax(-1)
    found = perplexity(model, IDS[:1, :2])
    assert found.tokens == 1
    assert found.nll == pytest.approx(-float(logs[IDS[0, 1]]), rel=1e-5)


def test_huge_losses_give_infinity() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, IDS).perplexity == math.inf


def test_nan_is_an_error() -> None:
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not a number"):
        perplexity(model, IDS)


@pytest.mark.parametrize("ids", [IDS[:, :1], IDS[0], IDS[:0]], ids=["one-token", "flat", "none"])
def test_windows_of_the_wrong_shape_are_refused(ids: Tensor) -> None:
    with pytest.raises(EvaluationError, match="at least 2 tokens"):
        perplexity(llama(), ids)


def test_encoder_is_refused() -> None:
    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    with pytest.raises(EvaluationError, match="no language-model head"):
        perplexity(BertModel(config).eval(), IDS)
