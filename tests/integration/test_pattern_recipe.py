"""A recipe's `runtime` key: what lands in the folder, and what reads it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel

import prunekit.pipeline.carry_out as carry_out
from prunekit import pipeline
from prunekit.cli.main import main
from prunekit.core.errors import PrunekitError, RuntimePolicyError, UsageError
from prunekit.core.recipe import parse_recipe
from prunekit.evaluate.subject import open_subject
from prunekit.export.onnx import export_onnx
from prunekit.export.ort import OrtDecoder, open_session
from prunekit.export.verify import Check, VerifyReport, _expected
from prunekit.runtime.attention.patterns._engine import dense_mask
from prunekit.runtime.attention.patterns.power import Power
from prunekit.runtime.attention.patterns.sink_window import SinkWindow

Small = Callable[[str], Path]
POWER = {"pattern": "power", "block_tokens": 4, "window_blocks": 2}
TEXT = {"perplexity": {"sequences": 2, "length_tokens": 40}}
pytestmark = pytest.mark.filterwarnings("ignore:sparse attention runs in plain torch")


@pytest.fixture(autouse=True)
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the fresh processes, which other tests of the same layouts have."""
    monkeypatch.setattr(carry_out, "_verified", lambda *arguments: VerifyReport(Path(), ()))


def recipe(folder: Path, runtime: dict[str, Any], remove: str = "blocks.1", **sections: Any) -> Any:
    steps = [{"remove": "sublayers", "by": {"score": "last_k"}, "budget": {"units": 1, "protect": [f"{remove}.*"]}}]
    if remove == "blocks.1":
        steps = [{"remove": "blocks", "by": {"score": "last_k", "keep_last": 2}, "budget": {"units": 1}}]
    model = {"source": str(folder)}
    calibrate = {"sequences": 2, "length_tokens": 16}
    return parse_recipe(
        {"schema": 1, "model": model, "calibrate": calibrate, "steps": steps, "runtime": runtime, **sections}
    )


def ids_of(n: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 60, (rows, n), generator=torch.Generator().manual_seed(0))


def under_mask(model: Any, ids: torch.Tensor, pattern: Any) -> torch.Tensor:
    n = ids.shape[1]
    with torch.no_grad():
        mask = dense_mask(pattern, n, n)[None, None].expand(len(ids), 1, n, n)
        return model(ids, attention_mask=mask, use_cache=False).logits


def test_the_folder_holds_the_pattern_and_both_ways_of_loading_it_work(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "o"
    result = pipeline.run(recipe(small("llama"), {**POWER, "length_tokens": 64}, evaluate=TEXT), out)
    section = json.loads((out / "config.json").read_text())["prunekit"]["runtime"]["attention"]
    facts = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 3}
    assert section == {**POWER, "sink_blocks": 1, "length_tokens": 64, "made_for": facts}
    ids = ids_of(50)
    stock = AutoModelForCausalLM.from_pretrained(out)
    sparse = AutoModelForCausalLM.from_pretrained(out, attn_implementation="prunekit")
    with torch.no_grad():
        torch.testing.assert_close(sparse(ids).logits, under_mask(stock, ids, Power(4, 2)))
        assert (sparse(ids).logits - stock(ids).logits).abs().max() > 1e-3
        with pytest.raises(RuntimePolicyError, match="a sequence of 65 tokens is longer"):
            sparse(ids_of(65))
    for name in ("README.md", "prunekit.json", "report.html"):
        assert "power" in (out / name).read_text()
    assert 'attn_implementation="prunekit"' in (out / "README.md").read_text()
    subject = open_subject(str(out), "cpu", None, 2)
    assert subject.attention == section
    assert subject.model.config._attn_implementation == "prunekit"
    strict = open_subject(str(out), "cpu", None, 2)
    strict.strict = True
    with pytest.raises(RuntimePolicyError, match="no kernel serves this model"):
        strict.model.eval()
    dense = pipeline.run(recipe(small("llama"), {"pattern": "dense"}, evaluate=TEXT), tmp_path / "d")
    assert result.after["perplexity"] != dense.after["perplexity"]
    assert result.before["perplexity"] == dense.before["perplexity"]


def test_layers_are_numbered_as_in_the_result(small: Small, tmp_path: Path) -> None:
    # Block 1 goes: of blocks 0, 1 and 3, the last becomes block 2.
    pipeline.run(recipe(small("llama"), {"attention": {**POWER, "layers": [0, 1, 3]}}), tmp_path / "o")
    section = json.loads((tmp_path / "o" / "config.json").read_text())["prunekit"]["runtime"]["attention"]
    assert section["layers"] == [0, 2]


def test_a_heterogeneous_result_reads_by_the_pattern_in_the_layers_named(small: Small, tmp_path: Path) -> None:
    steps = [{"remove": "attention", "by": {"score": "last_k", "keep_last": 2}, "budget": {"units": 1}}]
    asked = parse_recipe(
        {"schema": 1, "model": {"source": str(small("llama"))}, "steps": steps, "runtime": {**POWER, "layers": [3]}}
    )
    pipeline.run(asked, tmp_path / "o")
    ids = ids_of(50)
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "o", attn_implementation="prunekit")
    listed = sparse.config.prunekit["runtime"]["attention"]["layers"]
    kept = {n: block.self_attn for n, block in enumerate(sparse.model.layers) if hasattr(block.self_attn, "layer_idx")}
    assert {n: layer.layer_idx in listed for n, layer in kept.items()} == {0: False, 2: False, 3: True}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    with torch.no_grad():
        assert (sparse(ids).logits - stock(ids).logits).abs().max() > 1e-4


def test_dry_run_says_what_the_result_reads(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = {"schema": 1, "model": {"source": str(small("llama"))}, "runtime": POWER}
    steps = [{"remove": "blocks", "by": {"score": "last_k"}, "budget": {"units": 1}}]
    (tmp_path / "r.yaml").write_text(json.dumps({**text, "steps": steps}))
    assert main(["prune", "--recipe", str(tmp_path / "r.yaml"), "--dry-run"]) == 0
    assert "reads by the pattern `power` (block_tokens 4, window_blocks 2, sink_blocks 1)" in capsys.readouterr().err
    assert main(["prune", "--recipe", str(tmp_path / "r.yaml"), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runtime"]["attention"]["pattern"] == "power"


@pytest.mark.parametrize(
    ("family", "runtime", "sections", "what"),
    [
        ("llama", {"pattern": "dense", "causal": False}, {}, "`dense` is a bidirectional pattern"),
        ("bert", {"pattern": "power"}, {}, "`power` is a causal pattern"),
        ("llama", {"pattern": "power", "layers": [4]}, {}, "there is no block 4"),
        ("gemma2", {"pattern": "power"}, {}, "a cap on scores"),
        ("mistral", POWER, {"export": {"formats": ["safetensors", "onnx"]}}, "`onnx` cannot hold a pattern"),
        ("llama", {"pattern": "power", "length_tokens": 30}, {"evaluate": TEXT}, "`evaluate.perplexity` reads more"),
    ],
)
def test_a_pattern_that_cannot_be_the_models_is_refused_before_any_work(
    small: Small, tmp_path: Path, family: str, runtime: Any, sections: Any, what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        pipeline.run(recipe(small(family), runtime, **sections), tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_pattern_chosen_for_another_model_is_refused_when_used(small: Small, tmp_path: Path) -> None:
    out = tmp_path / "o"
    pipeline.run(recipe(small("llama"), POWER), out)
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation="prunekit")
    model.config.num_hidden_layers = 4
    with pytest.raises(RuntimePolicyError, match="`power` was chosen for another model") as caught, torch.no_grad():
        model(ids_of(20))
    assert caught.value.why == "`num_hidden_layers` was 3 there and is 4 here"
    # Cutting it again takes the pattern along, and the mark of the model before away.
    again = recipe(out, {"pattern": "dense"}, "blocks.0").model_copy(update={"runtime": None})
    pipeline.run(again, tmp_path / "again")
    section = json.loads((tmp_path / "again" / "config.json").read_text())["prunekit"]["runtime"]["attention"]
    assert section == {**POWER, "sink_blocks": 1}


def steps_of(run: OrtDecoder, ids: np.ndarray, mask: np.ndarray, prompt: int) -> np.ndarray:
    """Logits of a prompt, three tokens at once and single tokens, over the cache."""
    cache, parts = run.empty_cache(len(ids)), []
    cuts = [0, prompt, prompt + 3, *range(prompt + 4, ids.shape[1] + 1)]
    for first, last in itertools.pairwise(cuts):
        parts.append(run.step(ids[:, first:last], mask[:, :last], cache))
    return np.concatenate(parts, 1)


def test_a_graph_of_a_static_pattern_equals_the_masked_model(small: Small, tmp_path: Path) -> None:
    pattern = Power(4, 2)
    model = AutoModelForCausalLM.from_pretrained(small("llama"))
    model.config.prunekit = {"runtime": {"attention": POWER}}
    model.save_pretrained(tmp_path / "m")
    export_onnx(tmp_path / "m", tmp_path / "m" / "onnx")
    run, ids = OrtDecoder(tmp_path / "m" / "onnx"), ids_of(40)
    expected = under_mask(model, ids, pattern).numpy()
    ones = np.ones(ids.shape, np.int64)
    np.testing.assert_allclose(steps_of(run, ids.numpy(), ones, 30), expected, atol=1e-4)
    with torch.no_grad():
        assert np.abs(expected - model(ids).logits.numpy()).max() > 1e-2
    # Padding on the left moves nothing: positions count from the first token of a text.
    wide = np.concatenate([np.zeros((2, 5), np.int64), ids.numpy()], 1)
    mask = np.concatenate([np.zeros((2, 5), np.int64), ones], 1)
    np.testing.assert_allclose(steps_of(run, wide, mask, 30)[:, 5:], expected, atol=1e-4)
    # What checks a folder expects of its graph what the pattern reads.
    checks: list[Check] = []
    _expected(tmp_path / "m", None, checks)
    assert [(check.name, check.passed) for check in checks] == [("onnx computes what torch does", True)]


def test_a_graph_of_an_encoder_holds_its_pattern(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(**sizes, vocab_size=64)).eval()
    window = SinkWindow(1, 4, causal=False)
    section = {"pattern": "sink_window", "sink_tokens": 1, "window_tokens": 4, "causal": False}
    model.config.prunekit = {"runtime": {"attention": section}}
    model.save_pretrained(tmp_path / "m")
    export_onnx(tmp_path / "m", tmp_path / "onnx")
    ids = ids_of(20)
    with torch.no_grad():
        mask = dense_mask(window, 20, 20)[None, None].expand(2, 1, 20, 20)
        expected = model(ids, attention_mask=mask).last_hidden_state.numpy()
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones((2, 20), np.int64)}
    session = open_session(tmp_path / "onnx")
    names = {value.name for value in session.get_inputs()}
    feed |= {"token_type_ids": np.zeros((2, 20), np.int64)} if "token_type_ids" in names else {}
    np.testing.assert_allclose(session.run(None, feed)[0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "section", "what"),
    [
        ("llama", {"pattern": "quest"}, "the pattern `quest` has no mask"),
        ("mistral", POWER, "cannot be one graph"),
    ],
)
def test_what_no_mask_can_stand_for_is_refused_by_name(
    small: Small, tmp_path: Path, family: str, section: Any, what: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(small(family))
    model.config.prunekit = {"runtime": {"attention": section}}
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(PrunekitError) as caught:
        export_onnx(tmp_path / "m", tmp_path / "onnx")
    assert what in caught.value.what + caught.value.why
    assert not (tmp_path / "onnx").exists()
