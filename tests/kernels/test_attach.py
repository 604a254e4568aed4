"""Sparse attention inside a transformers model: equal to the dense-masked run, and gone without a trace."""

import warnings

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaModel,
    MistralConfig,
    MistralForCausalLM,
    SplinterConfig,
    SplinterModel,
    StaticCache,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

from prunekit.core.errors import RuntimePolicyError, UsageError
from prunekit.runtime import attach
from prunekit.runtime.attention import interface
from prunekit.runtime.attention.masks import dense_mask_of
from prunekit.runtime.attention.patterns._engine import dense_mask
from prunekit.runtime.attention.patterns.dense import Dense
from prunekit.runtime.attention.patterns.neighborhood import Neighborhood
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.sink_window import SinkWindow
from prunekit.runtime.attention.patterns.streaming import Streaming
from prunekit_kernels.block_sparse_prefill import block_sparse_prefill

PATTERNS = (Power(8, 2), SinkWindow(3, 12))
SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:sparse attention runs in plain torch")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(1, 100, (2, 70), generator=torch.Generator().manual_seed(1))


def masked(model, ids, pattern):
    """What the stock model says under the pattern as a dense mask."""
    n = ids.shape[1]
    return model(ids, attention_mask=dense_mask(pattern, n, n)[None, None].expand(len(ids), 1, n, n)).logits


def test_a_dense_pattern_equals_the_stock_model(model, ids):
    expected = model(ids).logits
    with attach(model, "dense"):
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_equals_the_masked_model_and_not_the_dense_one(model, ids, pattern):
    expected = masked(model, ids, pattern)
    with attach(model, pattern):
        got = model(ids).logits
    torch.testing.assert_close(got, expected)
    assert (got - model(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_steps_over_a_cache_equal_one_pass(model, ids, pattern):
    expected = masked(model, ids, pattern)
    with attach(model, pattern):
        out = model(ids[:, :40], use_cache=True)
        parts = [out.logits]
        for first, last in ((40, 60), *((t, t + 1) for t in range(60, 70))):
            out = model(ids[:, first:last], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_changes_nothing(model, ids, pattern, left):
    expected = masked(model, ids, pattern)
    pads = torch.zeros(2, 9, dtype=torch.long)
    ones = torch.ones_like(ids)
    wide, mask = (torch.cat(pair if left else pair[::-1], 1) for pair in ((pads, ids), (pads, ones)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with attach(model, pattern):
        got = model(wide, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[:, 9:] if left else got[:, :70], expected)


def test_chosen_layers_are_sparse_and_the_others_dense(model, ids):
    dense, sparse = model(ids).logits, masked(model, ids, Power(8, 2))
    with attach(model, Power(8, 2), layers=[1]):
        got = model(ids).logits
    with attach(model, Power(8, 2), layers=[]):
        torch.testing.assert_close(model(ids).logits, dense)
    assert (got - dense).abs().max() > 1e-3
    assert (got - sparse).abs().max() > 1e-3


def test_dense_layers_go_on_over_a_cache(model, ids):
    expected = model(ids).logits
    with attach(model, Power(8, 2), layers=[]):
        first = model(ids[:, :40], use_cache=True)
        rest = model(ids[:, 40:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), expected)


def test_everything_is_put_back(model, ids):
    before, implementation = model.config.to_dict(), model.config._attn_implementation
    expected = model(ids).logits

    def fails():
        with attach(model, "power") as same:
            assert same is model
            assert model.config._attn_implementation == "prunekit"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, expected)


def test_patterns_that_are_taken_off_in_any_order_leave_nothing(model):
    before, implementation = model.config.to_dict(), model.config._attn_implementation
    with attach(model, "power"):
        with attach(model, "streaming"):
            assert model.config.prunekit["runtime"]["attention"]["pattern"] == "streaming"
        assert model.config.prunekit["runtime"]["attention"]["pattern"] == "power"
    first, second, third = (attach(model, name) for name in ("power", "streaming", "dense"))
    second.detach()
    first.detach()
    assert model.config.prunekit["runtime"]["attention"]["pattern"] == "dense"
    third.detach()
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == implementation


def test_detach_keeps_what_else_the_config_says(model):
    model.config.prunekit = {"schema": 1, "runtime": {"other": 2}}
    attachment = attach(model, "power")
    assert model.config.prunekit["schema"] == 1
    assert model.config.prunekit["runtime"]["attention"]["pattern"] == "power"
    attachment.detach()
    attachment.detach()
    assert model.config.prunekit == {"schema": 1, "runtime": {"other": 2}}
    del model.config.prunekit


def test_a_saved_config_turns_the_pattern_on(model, ids, tmp_path):
    expected = masked(model, ids, Power(8, 2))
    with attach(model, Power(8, 2)):
        model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="prunekit").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, expected)


def test_a_sliding_window_model_honours_both_masks(ids):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=10)).eval()
    near = SinkWindow(0, 10)
    with torch.no_grad(), attach(model, SinkWindow(3, 30)):
        got = model(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(got, masked(model, ids, near))


@pytest.mark.parametrize("pattern", [*PATTERNS, "dense"], ids=str)
@pytest.mark.parametrize("fixed", [False, True], ids=["growing", "fixed"])
def test_a_padded_batch_under_a_sliding_window_writes_what_each_prompt_writes_alone(ids, pattern, fixed):
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20)
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    mask = torch.ones_like(ids)
    mask[0, :25] = 0
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    cache = StaticCache(config, max_cache_len=96) if fixed else None
    with attach(model, pattern):
        alone = model.generate(ids[:1, 25:], return_dict_in_generate=True, **greedy)
        both = model.generate(
            ids, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **greedy
        )  # fmt: skip
    torch.testing.assert_close(torch.cat(both.logits)[::2], torch.cat(alone.logits))


def test_an_image_that_reads_both_ways_does_so_under_a_causal_pattern(ids):
    torch.manual_seed(0)
    text = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "layer_types": ["full_attention"] * 3}
    eyes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4, image_token_index=0)
    model = Gemma3ForConditionalGeneration(config).eval().requires_grad_(False)
    ids = torch.cat([ids[:1, :30], torch.zeros(1, 4, dtype=torch.long), ids[:1, 30:]], 1)
    given = {"pixel_values": torch.randn(1, 3, 16, 16), "token_type_ids": (ids == 0).long()}
    expected = model(ids, **given).logits
    reader = model.model.language_model
    with attach(reader, "dense"):
        torch.testing.assert_close(model(ids, **given).logits, expected)
    # Of the keys before a query the pattern takes some away, of those behind it none.
    mask = interface.attention_mask(
        1, 6, 6, mask_function=lambda b, h, q, k: (k <= q) | ((q > 1) & (k > 1) & (k < 5)), device="cpu"
    )
    places, mask = mask[:, 0, 6:], mask[:, :, :6]
    seen = dense_mask_of(SinkWindow(0, 1), mask, places, torch.zeros(1, 1, 6, 1), 6, True)
    assert seen[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", [*PATTERNS, "dense"], ids=str)
@pytest.mark.parametrize("parts", [(70,), (35, 70), (60, 61, 62, 70)], ids=str)
def test_padding_between_tokens_counts_as_no_position(model, ids, pattern, parts):
    # As of a second message that is shorter than that of another row.
    mask = torch.ones_like(ids)
    mask[0, :4], mask[0, 30:37] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got, cache, first = [], None, 0
    with attach(model, pattern):
        expected = model(ids[:1, mask[0].bool()]).logits
        for last in parts:
            at = slice(first, last)
            out = model(
                ids[:, at], attention_mask=mask[:, :last], position_ids=positions[:, at], use_cache=True,
                past_key_values=cache,
            )  # fmt: skip
            got, cache, first = [*got, out.logits], out.past_key_values, last
    torch.testing.assert_close(torch.cat(got, 1)[:1, mask[0].bool()], expected)


@pytest.mark.parametrize("pattern", [*PATTERNS, Streaming(8, 1, 1)], ids=str)
@pytest.mark.parametrize("chunk", [1, 10])
def test_steps_over_a_sliding_cache_equal_one_pass(ids, pattern, chunk):
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20)
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    with attach(model, pattern):
        expected = model(ids, use_cache=False).logits
        out = model(ids[:, :40], use_cache=True)
        parts = [out.logits]
        for first in range(40, 70, chunk):
            out = model(ids[:, first : first + chunk], past_key_values=out.past_key_values, use_cache=True)
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    with attach(model, {"pattern": "sink_window", "length_tokens": 65}):
        out = model(ids[:, :60], use_cache=True)
        with pytest.raises(RuntimePolicyError, match="a sequence of 70 tokens is longer"):
            model(ids[:, 60:], past_key_values=out.past_key_values, use_cache=True)
        # A cache of fixed size has more slots than that.
        out = model(ids[:, :60], past_key_values=StaticCache(config, max_cache_len=96), use_cache=True)
        with pytest.raises(RuntimePolicyError, match="a sequence of 70 tokens is longer"):
            model(ids[:, 60:], past_key_values=out.past_key_values, use_cache=True)


def test_several_texts_in_one_row_are_refused(model, ids):
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    with attach(model, SinkWindow(3, 12)), pytest.raises(RuntimePolicyError, match="several texts lie in one row"):
        model(ids[:1], position_ids=positions, use_cache=False)
    with attach(model, "dense"):
        got = model(ids[:1], position_ids=positions, use_cache=False).logits
    apart = [model(part, use_cache=False).logits for part in (ids[:1, :30], ids[:1, 30:])]
    torch.testing.assert_close(got, torch.cat(apart, 1))


def test_padding_on_the_right_of_a_sliding_window_is_no_second_text(ids):
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=20)
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    mask = torch.ones_like(ids)
    mask[0, 50:] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with attach(model, SinkWindow(3, 12)):
        expected = model(ids[:1, :50]).logits
        got = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[:1, :50], expected)


def test_what_a_model_adds_to_attention_is_refused_and_not_left_out(ids):
    small = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
    softcapped = Gemma2ForCausalLM(Gemma2Config(**small)).eval()
    sinks = GptOssForCausalLM(GptOssConfig(**small, num_local_experts=2, num_experts_per_tok=1)).eval()
    biased = T5EncoderModel(T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)).eval()
    for model, causal, what in (
        (softcapped, True, "a cap on scores"),
        (sinks, True, "learned attention sinks"),
        (biased, False, "a bias by position"),
    ):
        # Layers that stay dense lose it as well.
        for layers in (None, []):
            section = {"pattern": "dense", "causal": causal}
            with attach(model, section, layers=layers), pytest.raises(RuntimePolicyError, match=what):
                model(ids)


def test_attention_weights_are_not_left_out_in_silence(model, ids):
    with attach(model, "dense"), pytest.raises(RuntimePolicyError, match="gives no attention weights"):
        model(ids, output_attentions=True)


def test_values_of_another_size_than_queries_are_refused(ids):
    config = DeepseekV3Config(
        **SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=16, first_k_dense_replace=3,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config).eval()
    cache = StaticCache(config, max_cache_len=96)
    model(ids, past_key_values=cache, use_cache=True)
    with attach(model, "dense"):
        for new, more in ((ids, {}), (ids[:, :1], {"past_key_values": cache})):
            with pytest.raises(RuntimePolicyError, match="values of 16 channels beside queries of 24"):
                model(new, **more)


def test_models_that_no_pattern_is_for_are_refused_and_left_as_they_were(model, monkeypatch):
    bart = BartModel(
        BartConfig(
            vocab_size=100, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32
        )
    )
    mamba = MambaModel(MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1))
    for other, what in ((bart, "an encoder and a decoder"), (mamba, "cannot read by a pattern")):
        before = other.config.to_dict()
        with pytest.raises(RuntimePolicyError, match=what):
            attach(other, "power")
        assert other.config.to_dict() == before

    def fails(name):
        raise ZeroDivisionError

    before = model.config.to_dict()
    monkeypatch.setattr(model, "set_attn_implementation", fails)
    with pytest.raises(ZeroDivisionError):
        attach(model, "power")
    assert model.config.to_dict() == before


def test_what_is_no_pattern_or_no_list_of_layers_is_refused(model):
    with pytest.raises(UsageError, match="`Linear` is no model of transformers"):
        attach(torch.nn.Linear(2, 2), "dense")
    for wrong in (42, None, Power):
        with pytest.raises(UsageError, match="is no pattern"):
            attach(model, wrong)
    for layers in ("01", 1, [0.5], [True]):
        with pytest.raises(UsageError, match="no list of layers"):
            attach(model, Power(), layers=layers)
    with pytest.raises(UsageError, match="`layers` is given twice"):
        attach(model, {"pattern": "power", "layers": [0]}, layers=[1])


def test_an_encoder_takes_a_two_sided_pattern_only(ids):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).eval().requires_grad_(False)
    two_sided = SinkWindow(2, 8, causal=False)
    mask = dense_mask(two_sided, 70, 70)[None, None].expand(2, 1, 70, 70)
    expected = model(ids, attention_mask=mask).last_hidden_state
    with attach(model, two_sided):
        torch.testing.assert_close(model(ids).last_hidden_state, expected)
    with (
        attach(model, Dense(causal=True)),
        pytest.raises(RuntimePolicyError, match="a causal pattern on a bidirectional"),
    ):
        model(ids)


def test_layers_that_do_not_tell_what_their_keys_are_are_refused(ids):
    model = SplinterModel(SplinterConfig(**SIZES)).eval()
    for causal in (True, False):
        with (
            attach(model, Dense(causal=causal)),
            pytest.raises(RuntimePolicyError, match="`SplinterSelfAttention` does not tell whether it is causal"),
        ):
            model(ids)
    encoder = BertModel(BertConfig(**SIZES))
    layer = encoder.encoder.layer[0].attention.self
    with attach(encoder, Dense(causal=False)), pytest.raises(RuntimePolicyError, match="7 queries and 9 keys"):
        interface.attention(layer, *(torch.zeros(1, 4, n, 16) for n in (7, 9, 9)), None)


def test_a_grid_pattern_goes_through_its_own_order_and_back():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=36, patch_size=4
    )
    model = ViTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    image = torch.randn(2, 3, 36, 36)
    near = Neighborhood((9, 9), 3, dilation=(2, 1), prefix_tokens=1, tile=(3, 4))
    seen = dense_mask(near, 82, 82)
    with attach(model, near):
        got = model(image).last_hidden_state
    assert (got - model(image).last_hidden_state).abs().max() > 1e-3

    def masked_attention(module, query, key, value, attention_mask, scaling, **options):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("masked_for_test", masked_attention)
    model.set_attn_implementation("masked_for_test")
    torch.testing.assert_close(got, model(image).last_hidden_state)
    model.set_attn_implementation("sdpa")
    row = Neighborhood((70,), 9, causal_axes=1)
    decoder = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)).eval().requires_grad_(False)
    ids = torch.randint(1, 100, (1, 70))
    expected = masked(decoder, ids, row)
    with attach(decoder, row):
        torch.testing.assert_close(decoder(ids).logits, expected)
        with pytest.raises(UsageError, match="does not fit a sequence of 71"):
            decoder.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        with pytest.raises(RuntimePolicyError, match="does not go with padding"):
            decoder(ids, attention_mask=torch.arange(70)[None] > 3)
    with attach(model, Neighborhood((8, 8), 3)), pytest.raises(UsageError, match="does not fit a sequence of 82"):
        model(image)


def test_a_model_loaded_under_a_pattern_says_once_that_it_runs_without_kernels(model, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(interface, "_SAID", set())
    model.config.prunekit = {"runtime": {"attention": {"pattern": "power"}}}
    model.save_pretrained(tmp_path)
    del model.config.prunekit
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="prunekit").eval()
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        again(ids)
        again(ids)
    assert len([w for w in said if "plain torch" in str(w.message)]) == 1


def test_a_pattern_for_another_model_or_shorter_sequences_is_refused(model, ids):
    facts = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3}
    section = {"pattern": "power", "block_tokens": 8, "length_tokens": 70, "made_for": facts}
    before = model.config.to_dict()
    with attach(model, section):
        model(ids)
        with pytest.raises(RuntimePolicyError, match="a sequence of 71 tokens is longer than `power`"):
            model(torch.cat([ids, ids[:, :1]], 1))
        # A cache of fixed size counts by what it holds.
        cache = StaticCache(model.config, max_cache_len=128)
        model(ids, past_key_values=cache, use_cache=True)
        with pytest.raises(RuntimePolicyError, match="a sequence of 71 tokens"):
            model(ids[:, :1], past_key_values=cache, use_cache=True)
    with pytest.raises(RuntimePolicyError, match="was chosen for another model") as caught:
        attach(model, {**section, "made_for": {**facts, "hidden_size": 576}})
    assert caught.value.why == "`hidden_size` was 576 there and is 64 here"
    with pytest.raises(RuntimePolicyError, match="names layer 3"):
        attach(model, "power", layers=[1, 3])
    assert model.config.to_dict() == before
    for wrong, said in (
        ({"length_tokens": 0}, "no length"),
        ({"made_for": 1}, "no mapping"),
        ({"fastest": 1}, "neither"),
    ):
        with pytest.raises(UsageError, match=said):
            attach(model, {**section, **wrong})


def test_prompts_may_go_to_whatever_is_faster(model, ids, monkeypatch):
    expected, asked = masked(model, ids, Power(8, 2)), []

    def faster(q, k, v, lists, *, scale):
        asked.append(q.shape[2])
        return block_sparse_prefill(q, k, v, lists, scale=scale)[0]

    monkeypatch.setattr(interface, "prefill_fastest", faster)
    with attach(model, Power(8, 2)):
        model(ids)
    assert asked == []
    with attach(model, {"pattern": "power", "block_tokens": 8, "window_blocks": 2, "fastest": True}):
        torch.testing.assert_close(model(ids).logits, expected)
    assert asked == [70] * 3


def test_the_path_without_kernels_is_said_once_and_refused_when_strict(model, ids):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with attach(model, "power"):
            model(ids)
            model(ids)
    assert [str(w.message) for w in said if "plain torch" in str(w.message)] == [
        "sparse attention runs in plain torch: the tensors are on `cpu`, the kernels need a CUDA device"
    ]
    with pytest.raises(RuntimePolicyError, match="no kernel"):
        attach(model, "power", strict=True)
    assert model.config._attn_implementation != "prunekit"


@pytest.mark.parametrize("pattern", ["dense", Power(8, 2, 1)], ids=str)
def test_what_inference_mode_left_in_caches_serves_a_training_prompt(pattern):
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    new = torch.randint(1, 100, (1, 61))
    with attach(model, pattern):
        with torch.inference_mode():
            model.generate(new, max_new_tokens=2, do_sample=False, pad_token_id=0)
        model(new).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
