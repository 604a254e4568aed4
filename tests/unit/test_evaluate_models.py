"""Embedding and feature likeness, speed, samples and memory on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BatchEncoding,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from prunekit.core.errors import EvaluationError
from prunekit.evaluate.embedding import embedding_cosine, feature_cosine
from prunekit.evaluate.latency import measure_latency
from prunekit.evaluate.memory import peak_memory
from prunekit.evaluate.sample import continuation

IDS = torch.randint(3, 97, (5, 12), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(12) < torch.tensor([12, 4, 7, 12, 1])[:, None]).long()


def bert(seed: int, hidden: int = 32) -> BertModel:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=97, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return BertModel(config).eval()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


def vit(seed: int, labels: bool) -> Any:
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    return (ViTForImageClassification(config) if labels else ViTModel(config)).eval()


def test_embedding_cosine_equals_pooling_each_sentence_alone() -> None:
    a, b = bert(0), bert(1)
    found = embedding_cosine(a, b, {"input_ids": IDS, "attention_mask": MASK}, batch_size=2)
    cosines, largest = [], 0.0
    with torch.no_grad():
        for row, length in zip(IDS, MASK.sum(1).tolist(), strict=True):
            va, vb = (m(row[None, :length]).last_hidden_state[0].double().mean(0) for m in (a, b))
            cosines.append(float(va @ vb / (va.norm() * vb.norm())))
            largest = max(largest, float((va - vb).abs().max()))
    assert found.mean == pytest.approx(sum(cosines) / 5, abs=1e-5)
    assert found.min == pytest.approx(min(cosines), abs=1e-5)
    assert found.max_abs_diff == pytest.approx(largest, abs=1e-5)
    assert found.sequences == 5
    assert found.mean < 0.99


def test_a_model_equals_itself() -> None:
    found = embedding_cosine(bert(0), bert(0), {"input_ids": IDS, "attention_mask": MASK})
    assert (found.mean, found.min, found.max_abs_diff) == (pytest.approx(1.0), pytest.approx(1.0), 0.0)


def test_embeddings_of_different_size_are_refused() -> None:
    with pytest.raises(EvaluationError, match="differ in size"):
        embedding_cosine(bert(0), bert(0, hidden=16), {"input_ids": IDS})


def test_nan_embeddings_are_refused() -> None:
    broken = bert(0)
    with torch.no_grad():
        broken.embeddings.LayerNorm.weight.fill_(float("nan"))
    with pytest.raises(EvaluationError, match="not a number"):
        embedding_cosine(bert(0), broken, {"input_ids": IDS})


@pytest.mark.parametrize("labels", [True, False], ids=["logits", "features"])
def test_feature_cosine_of_vision_models(labels: bool) -> None:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    a, b = vit(0, labels), vit(1, labels)
    found = feature_cosine(a, b, {"pixel_values": pixels})
    with torch.no_grad():
        va, vb = (m(pixels).logits if labels else m(pixels).last_hidden_state[:, 0] for m in (a, b))
    assert found.mean == pytest.approx(float(torch.cosine_similarity(va, vb).mean()), abs=1e-5)
    assert feature_cosine(a, a, {"pixel_values": pixels}).min == pytest.approx(1.0)


def test_latency_of_a_decoder_counts_tokens_of_all_sequences() -> None:
    found = measure_latency(llama(), batch=2, prompt_tokens=16, new_tokens=4, repeats=3)
    assert found.decode_ms is not None
    assert found.decode_tokens_s is not None
    assert found.prefill_tokens_s == pytest.approx(2 * 16 / (found.prefill_ms / 1e3))
    assert found.decode_tokens_s == pytest.approx(2 / (found.decode_ms / 1e3))
    assert (found.batch, found.prompt_tokens, found.new_tokens, found.repeats) == (2, 16, 4, 3)
    assert (found.device, found.dtype) == ("cpu", "float32")


def test_latency_runs_once_more_than_it_counts_and_decodes_with_the_cache() -> None:
    model, lengths = llama(), []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    measure_latency(model, batch=1, prompt_tokens=9, new_tokens=3, repeats=2)
    assert lengths == [9, 1, 1, 1] * 3


@pytest.mark.parametrize(("model", "tokens"), [(bert(0), 16), (vit(0, True), 16)], ids=["bert", "vit"])
def test_latency_of_an_encoder_has_no_decode(model: Any, tokens: int) -> None:
    found = measure_latency(model, batch=2, prompt_tokens=16, new_tokens=4, repeats=1)
    assert (found.decode_tokens_s, found.decode_ms, found.new_tokens) == (None, None, 0)
    assert found.prompt_tokens == tokens
    assert found.prefill_tokens_s == pytest.approx(2 * tokens / (found.prefill_ms / 1e3))


class Numbers:
    """A tokenizer of numbers."""

    pad_token_id = 0

    def __call__(self, text: str, **options: Any) -> BatchEncoding:
        ids = torch.tensor([[int(word) for word in text.split()]])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def decode(self, ids: Any, skip_special_tokens: bool) -> str:
        return " ".join(str(int(i)) for i in ids)


def test_continuation_is_greedy_whatever_the_model_says() -> None:
    model = llama()
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    model.generation_config.repetition_penalty = 3.0
    model.generation_config.eos_token_id = None
    ids = [5, 17, 80]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert continuation(model, Numbers(), "5 17 80", new_tokens=6) == " ".join(map(str, ids[3:]))


def test_peak_memory_sees_a_large_tensor() -> None:
    with peak_memory() as small:
        torch.ones(1)
    with peak_memory() as large:
        torch.ones(64 * 2**20).sum()
    assert large.host_bytes - small.host_bytes > 200e6
    assert large.device_bytes is None
