"""Log-likelihoods and greedy continuations in batches against one row at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prunekit.core.errors import EvaluationError
from prunekit.evaluate.generation import continuations
from prunekit.evaluate.likelihood import Request, likelihoods, split_request
from tests.tiny import VOCAB, tiny_model


def rows(seed: int = 0) -> list[Request]:
    """Requests of many lengths, contexts of 1 to 20 tokens and continuations of 1 to 6."""
    draw = torch.Generator().manual_seed(seed)

    def ids(most: int) -> tuple[int, ...]:
        length = int(torch.randint(1, most + 1, (1,), generator=draw))
        return tuple(torch.randint(3, VOCAB, (length,), generator=draw).tolist())

    return [Request(ids(20), ids(6)) for _ in range(23)]


def plain(model: Any, request: Request) -> tuple[float, bool]:
    whole = torch.tensor([request.context + request.continuation])
    with torch.no_grad():
        logs = model(whole).logits[0].double().log_softmax(-1)
    first = len(request.context) - 1
    places = range(first, first + len(request.continuation))
    total = sum(float(logs[p, token]) for p, token in zip(places, request.continuation, strict=True))
    greedy = all(int(logs[p].argmax()) == token for p, token in zip(places, request.continuation, strict=True))
    return total, greedy


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_likelihood_does_not_depend_on_the_batch(family: str, batch_size: int) -> None:
    model, asked = tiny_model(family, dtype=torch.float32), rows()
    for request, found in zip(asked, likelihoods(model, asked, batch_size), strict=True):
        logprob, greedy = plain(model, request)
        assert found.logprob == pytest.approx(logprob, abs=2e-4)
        assert found.greedy is greedy


def test_greedy_continuation_is_called_greedy() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    context = (5, 9, 20)
    (written,) = continuations(model, [context], 4)
    found = likelihoods(model, [Request(context, tuple(written)), Request(context, (3, 3))])
    assert [entry.greedy for entry in found] == [True, False]


def test_choices_of_one_token_share_their_contexts_pass() -> None:
    model, seen = tiny_model("llama", dtype=torch.float32), []
    asked = [Request((5, 9, 20), (token,)) for token in (3, 4, 5, 6)] + [Request((5, 9, 20), (7, 8))]
    expected = [plain(model, request)[0] for request in asked]
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = likelihoods(model, asked, batch_size=8)
    # Two passes before the batch compare the head with the model's own logits.
    assert seen[2:] == [(2, 4)]
    assert [entry.logprob for entry in found] == pytest.approx(expected, abs=2e-4)


def test_nan_is_an_error() -> None:
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not a number"):
        likelihoods(model, rows()[:2])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_continuations_do_not_depend_on_the_batch(family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    prompts = [list(request.context) for request in rows()[:9]]
    alone = [continuations(model, [prompt], 6)[0] for prompt in prompts]
    assert continuations(model, prompts, 6, batch_size=4) == alone
    assert all(len(ids) <= 6 for ids in alone)


class Letters:
    """A tokenizer of letters that joins `ab`, with a beginning and an end of text where asked."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __init__(self, begins: bool = False, ends: bool = False) -> None:
        self.begins, self.ends = begins, ends

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        ids = [900 if part == "#" else ord(part) for part in text.replace("ab", "#")]
        if add_special_tokens:
            ids = [1] * self.begins + ids + [2] * self.ends
        return {"input_ids": ids}


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("begins", [False, True])
def test_special_tokens_come_to_the_front_only(begins: bool, ends: bool) -> None:
    found = split_request(Letters(begins, ends), "xy", " z")
    assert found == Request((*([1] * begins), 120, 121), (32, 122))


def test_blanks_of_the_context_go_to_the_continuation() -> None:
    assert split_request(Letters(), "x  ", "z") == Request((120,), (32, 32, 122))


def test_a_token_across_the_border_belongs_to_the_continuation() -> None:
    assert split_request(Letters(), "xa", "b") == Request((120,), (900,))


def test_an_empty_context_is_the_beginning_of_text() -> None:
    assert split_request(Letters(), "", "z") == Request((1,), (122,))
    tokenizer = Letters()
    tokenizer.bos_token_id = None
    assert split_request(tokenizer, "", "z") == Request((2,), (122,))
    tokenizer.eos_token_id = None
    with pytest.raises(EvaluationError, match="empty context"):
        split_request(tokenizer, "", "z")
