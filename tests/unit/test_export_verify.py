"""The judgement in `verify`: what differs, what a cache must hold, what is never run."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prunekit.export._child import _NoPrunekit
from prunekit.export.verify import Check, Reference, VerifyReport, _difference, _process_checks, expected_kv_heads

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_report_names_what_failed() -> None:
    report = VerifyReport(Path("x"), (Check("a", True), Check("b", False, "because"), Check("c", False)))
    assert not report.ok
    assert report.problems == ("b: because", "c")
    assert report.to_json()["checks"][1] == {"name": "b", "passed": False, "detail": "because"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1.0])
def test_wrong_number_outside_padding_fails(bad: float) -> None:
    a = torch.ones(1, 3, 2)
    b, padded = a.clone(), a.clone()
    b[0, 2, 0] += bad
    padded[0, 0, 0] += bad
    inputs = {"attention_mask": torch.tensor([[0, 1, 1]])}
    assert not _difference(a, b, "float32", inputs)[1]
    assert _difference(a, padded, "float32", inputs)[1]


def test_float64_is_held_to_a_stricter_limit() -> None:
    a = torch.ones(1, 2, dtype=torch.float64)
    assert not _difference(a, a + 1e-6, "float64", {})[1]
    assert _difference(a.float(), a + 1e-6, "float64", {})[1]


def test_other_shape_fails_without_a_figure() -> None:
    diff, passed, detail = _difference(torch.ones(1, 2), torch.ones(1, 3), "float32", {})
    assert (diff, passed) == (None, False)
    assert detail == "shape [1, 3] instead of [1, 2]"


def test_stock_cache_holds_every_layer() -> None:
    assert expected_kv_heads(LLAMA) == [2, 2, 2]
    assert expected_kv_heads({"model_type": "gpt2", "n_layer": 2, "n_head": 4}) == [4, 4]
    assert expected_kv_heads({"model_type": "vit"}) is None


def test_heterogeneous_cache_leaves_removed_attention_out() -> None:
    layers = {"00": {"skip": ["attention"]}, "02": {"num_key_value_heads": 1, "num_attention_heads": 2}}
    config = {**LLAMA, "model_type": "prunekit_llama", "prunekit": {"per_layer_config": layers}}
    assert expected_kv_heads(config) == [2, 1]


def answer(**other: Any) -> dict[str, Any]:
    """A process that found everything right."""
    good = {
        "class": "LlamaForCausalLM",
        "keys": {"missing_keys": [], "unexpected_keys": []},
        "outputs": torch.ones(1, 2, 3),
        "tied": True,
        "tie_expected": True,
        "kv_heads": [2, 2, 2],
        "cached": [[1, 2]],
        "uncached": [[1, 2]],
        "alone": [[1, 2]],
        "token_ids": [[5]],
        "token_ids_again": [[5]],
        "chat": "",
    }
    return good | other


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"error": "OSError: gone"}, "loads with prunekit: OSError: gone"),
        ({"keys": {"missing_keys": ["a.weight"]}}, "loads with prunekit: 1 missing keys (`a.weight`)"),
        ({"outputs": torch.zeros(1, 2, 3)}, "computes the same with prunekit"),
        ({"uncached": [[1, 3]]}, "cache and no cache agree with prunekit"),
        ({"alone": [[1, 3]]}, "left padding and none agree with prunekit"),
        ({"kv_heads": [2, 2]}, "cache holds what attention needs with prunekit"),
        ({"tied": False}, "embeddings are tied as configured with prunekit: not tied"),
        ({"token_ids_again": [[6]]}, "tokenizer round trip with prunekit"),
        ({"token_ids": [[]], "token_ids_again": [[]]}, "tokenizer round trip with prunekit"),
        ({"refused_untrusted": False}, "does not load by mistake"),
    ],
    ids=["good", "error", "missing", "outputs", "cache", "padding", "kv", "tied", "tokens", "no-tokens", "untrusted"],
)
def test_each_fault_fails_its_check(change: dict[str, Any], problem: str) -> None:
    checks: list[Check] = []
    _process_checks("prunekit", answer(**change), Reference({}, torch.ones(1, 2, 3)), "float64", LLAMA, checks)
    problems = VerifyReport(Path("x"), tuple(checks)).problems
    assert [text for text in problems if text.startswith(problem)] == list(problems)
    assert bool(problems) == bool(problem)


def test_hook_hides_prunekit_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [_NoPrunekit(), *sys.meta_path])
    for name in [name for name in sys.modules if name.split(".")[0] == "prunekit"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="prunekit"):
        importlib.import_module("prunekit")
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    assert importlib.import_module("colorsys").__name__ == "colorsys"
