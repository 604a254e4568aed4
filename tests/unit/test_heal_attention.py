"""Attention in training: who reads whom, and a model that is what it was afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prunekit.core.errors import HealError, RecipeError, UsageError
from prunekit.core.recipe import parse_recipe
from prunekit.heal._attention import Switch, attending
from prunekit.heal._data import gather
from prunekit.heal.attentions.shifted_sparse import ShiftedSparse
from prunekit.heal.attentions.subsampled import Subsampled
from prunekit.heal.run import check, heal
from tests.healing import Bench, bench
from tests.tiny import tiny_model

H, KV, D = 8, 2, 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return bench(tmp_path_factory.mktemp("llama"))


def read(method: Any, tokens: int, seed: int = 0) -> Tensor:
    """Which keys each head and query reads, bool [H, T, T]: values are unit vectors, so that outputs are weights."""
    torch.manual_seed(seed)
    query, key = torch.randn(1, H, tokens, tokens), torch.randn(1, KV, tokens, tokens)
    value = torch.eye(tokens).expand(1, KV, tokens, tokens)
    weights = method.attend(query, key, value, None)[0]
    torch.testing.assert_close(weights.sum(-1), torch.ones(H, tokens))
    return weights > 0


def dense(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    scores = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(("tokens", "groups", "sinks"), [(24, 3, 2), (16, 4, 0), (32, 2, 20)])
def test_shifted_sparse_reads_its_group_and_the_sinks(tokens: int, groups: int, sinks: int) -> None:
    found = read(ShiftedSparse(groups=groups, sinks=sinks), tokens)
    size = tokens // groups
    for head in range(H):
        shift = size // 2 if head >= 6 else 0
        group = [(at - shift) % tokens // size for at in range(tokens)]
        expected = [[k <= q and (group[k] == group[q] or k < sinks) for k in range(tokens)] for q in range(tokens)]
        assert found[head].tolist() == expected


@pytest.mark.parametrize("seed", range(4))
def test_subsampled_reads_one_sample_and_neighbours(seed: int) -> None:
    method = Subsampled(keep=0.5, local=0.5)
    found = read(method, 32, seed)
    assert method.sizes(32) == (8, 8)
    assert bool((found == found[0]).all())
    reads = found[0]
    assert not bool(reads.triu(1).any())
    assert bool(reads.diagonal().all())
    # In the last row every key of the sample shows, and at most a block besides.
    sample = [k for k in range(24) if bool(reads[24:, k].all())]
    apart = [(q, k) for q in range(32) for k in range(q) if bool(reads[q, k]) and k not in sample and q - k >= 8]
    assert apart == []
    assert int(reads[-1].sum()) <= 16
    assert not bool((found == read(method, 32, seed + 10)).all())


def test_what_is_read_is_weighted_as_by_dense_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, H, 16, D), torch.randn(2, KV, 16, D), torch.randn(2, KV, 16, D)
    method = ShiftedSparse(groups=2, sinks=1)
    allowed = read(method, 16)
    found = method.attend(query, key, value, None)
    torch.testing.assert_close(found, dense(query, key, value, allowed), rtol=1e-5, atol=1e-5)
    whole = method.attend(query, key, value, 0.1)
    torch.testing.assert_close(whole, dense(query * 0.1 * D**0.5, key, value, allowed), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["shifted_sparse", {"method": "subsampled", "dense_end": 0.0}])
def test_model_is_what_it_was_after_training(llama: Bench, tmp_path: Path, method: Any) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    asked = {"steps": 20, "check_every": 20, "length_tokens": 16}
    plain = heal(llama.scene(**asked), tmp_path / "plain")
    healed = heal(llama.scene(**asked, attention=method), tmp_path / "w")
    assert healed.model.config._attn_implementation == "sdpa"
    assert "prunekit_heal" not in ALL_ATTENTION_FUNCTIONS.valid_keys()
    # The held-out part is read densely before and after; training itself went another way.
    assert healed.about["held_out_before"] == plain.about["held_out_before"]
    assert healed.about["held_out_after"] != plain.about["held_out_after"]
    assert healed.about["held_out_after"] < healed.about["held_out_before"]
    data = gather(llama.scene(**asked))
    from prunekit.heal._losses import kl
    from prunekit.modeling.load import load_model

    ids = data.inputs["input_ids"][data.held_out]
    with torch.no_grad():
        now = kl(healed.model(ids).logits, load_model(llama.dense)(ids).logits, 1.0)
    assert float(now) == pytest.approx(healed.about["held_out_after"], rel=1e-4)


def test_last_steps_are_dense(llama: Bench) -> None:
    switch = Switch(llama.scene(steps=10, attention={"method": "subsampled", "keep": 0.25, "dense_end": 0.3}).asked)
    model = tiny_model("llama", dtype=torch.float32).train()
    ids = torch.arange(32)[None] % 60
    own = model(ids).logits
    with attending(model, switch):
        switch.at_step(6)
        assert not torch.allclose(model(ids).logits, own, atol=1e-4)
        torch.testing.assert_close(model.eval()(ids).logits, own)
        model.train()
        switch.at_step(7)
        torch.testing.assert_close(model(ids).logits, own)
    torch.testing.assert_close(model(ids).logits, own)


def test_sliding_windows_are_refused(llama: Bench) -> None:
    model = tiny_model("mistral", dtype=torch.float32).train()
    switch, ids = Switch(llama.scene(attention="shifted_sparse").asked), torch.arange(16)[None]
    own = model(ids).logits
    with attending(model, switch):
        with pytest.raises(HealError, match="plain causal attention alone"):
            model(ids)
        torch.testing.assert_close(model.eval()(ids).logits, own)
    assert model.config._attn_implementation == "sdpa"


def test_lengths_and_encoders_that_do_not_go_with_it_are_refused_before_any_work(llama: Bench) -> None:
    with pytest.raises(UsageError, match="no 4 groups that can be shifted") as caught:
        check(llama.scene(attention="shifted_sparse", length_tokens=20).asked, decoder=True)
    assert "multiple of 8" in caught.value.hint
    with pytest.raises(UsageError, match="blocks of 1, 16 are asked for"):
        check(llama.scene(attention="subsampled", length_tokens=127).asked, decoder=True)
    with pytest.raises(UsageError, match="needs a model that writes text"):
        check(llama.scene(attention="subsampled", length_tokens=16).asked, decoder=False)


def test_recipe_takes_a_name_or_a_mapping_and_names_what_is_wrong() -> None:
    step = {"remove": "blocks", "by": {"score": "last_k"}, "budget": {"units": 1}}

    def recipe(attention: Any) -> Any:
        heal = {"method": "distill", "attention": attention}
        return parse_recipe({"schema": 1, "model": {"source": "m"}, "steps": [step], "heal": heal})

    assert recipe("shifted_sparse").effective()["heal"]["attention"] == {
        "method": "shifted_sparse", "groups": 4, "sinks": 4,
    }  # fmt: skip
    written = recipe({"method": "subsampled", "keep": 0.5}).effective()
    assert parse_recipe(written).effective() == written
    for attention, words in (
        ("shifted", "no attention named `shifted`"),
        ({"method": "subsampled", "keep": 2.0}, "keep"),
    ):
        with pytest.raises(RecipeError, match=words):
            recipe(attention)
