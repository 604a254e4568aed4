"""ONNX export of decoders: one graph with a KV cache that prefills, decodes and continues."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prunekit.core.errors import ExportError
from prunekit.export import _trace
from prunekit.export.onnx import export_onnx
from prunekit.export.ort import OrtDecoder, compare_onnx

WIDTHS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, tie_word_embeddings=True))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**WIDTHS, head_dim=8))


def qwen2_sliding() -> PreTrainedModel:
    """One layer sees everything, the other four tokens."""
    return Qwen2ForCausalLM(Qwen2Config(**WIDTHS, use_sliding_window=True, sliding_window=4, max_window_layers=1))


def save(make: Callable[[], PreTrainedModel], folder: Path) -> Path:
    torch.manual_seed(0)
    make().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama, tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def onnx_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    report = export_onnx(model_folder, folder)
    assert report.kind == "decoder"
    assert report.cached_layers == 2
    assert {"input_ids", "attention_mask", "position_ids"} <= set(report.inputs)
    assert report.outputs[0] == "logits"
    return folder


def test_whole_text_and_pieces_give_torch_logits(model_folder: Path, onnx_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    runner = OrtDecoder(onnx_folder)
    ids = torch.randint(3, 64, (1, 20), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    array, mask = ids.numpy(), np.ones((1, 20), np.int64)
    for cuts in ([20], [1] * 20, [5, 1, 7, 7]):
        cache, found, start = runner.empty_cache(1), [], 0
        for size in cuts:
            found.append(runner.step(array[:, start : start + size], mask[:, : start + size], cache))
            start += size
        assert np.abs(np.concatenate(found, axis=1) - expected).max() < 1e-5


def test_left_padded_rows_continue_as_torch_continues_them_alone(model_folder: Path, onnx_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    rows = [torch.randint(3, 64, (1, n), generator=torch.Generator().manual_seed(n)) for n in (3, 9, 6)]
    ids, mask = np.zeros((3, 9), np.int64), np.zeros((3, 9), np.int64)
    for number, row in enumerate(rows):
        ids[number, 9 - row.shape[1] :] = row.numpy()
        mask[number, 9 - row.shape[1] :] = 1
    found = OrtDecoder(onnx_folder).generate(ids, mask, 12)
    for number, row in enumerate(rows):
        made = model.generate(
            input_ids=row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=12, min_new_tokens=12
        )
        assert found[number].tolist() == made[0, row.shape[1] :].tolist()


def test_rows_stop_at_the_end_token(onnx_folder: Path) -> None:
    runner = OrtDecoder(onnx_folder)
    ids, mask = np.array([[5, 9, 11], [8, 3, 4]]), np.ones((2, 3), np.int64)
    free = runner.generate(ids, mask, 8)
    stopped = runner.generate(ids, mask, 8, stop=[int(free[0, 0])])
    assert (stopped[0] == free[0, 0]).all()
    everything = sorted({int(token) for token in free[:, 0]})
    assert runner.generate(ids, mask, 8, stop=everything).shape == (2, 1)


def test_comparison_reports_equal_tokens(model_folder: Path, onnx_folder: Path) -> None:
    parity = compare_onnx(model_folder, onnx_folder, new_tokens=10)
    assert parity.ok
    assert parity.same_greedy_tokens
    assert parity.n_tokens == 30
    assert 0 < parity.max_abs_diff < 1e-5


def test_comparison_with_another_model_fails(onnx_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    llama().save_pretrained(tmp_path)
    parity = compare_onnx(tmp_path, onnx_folder, new_tokens=4)
    assert not parity.ok
    assert parity.max_abs_diff > 1e-2


def test_axes_have_names_and_widths(onnx_folder: Path) -> None:
    runner = OrtDecoder(onnx_folder)
    assert runner.inputs["input_ids"].shape == ["batch_size", "sequence_length"]
    assert runner.inputs["attention_mask"].shape == ["batch_size", "past_sequence_length + sequence_length"]
    assert runner.inputs["past_key_values.1.value"].shape == ["batch_size", 2, "past_sequence_length", 8]


@pytest.mark.parametrize(
    "make",
    [gpt2, qwen2_sliding, pytest.param(qwen3, marks=pytest.mark.slow)],
    ids=["gpt2", "qwen2-sliding-window", "qwen3"],
)
def test_other_families_agree_with_torch(make: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    folder = save(make, tmp_path / "model")
    report = export_onnx(folder, tmp_path / "onnx")
    parity = compare_onnx(folder, tmp_path / "onnx", new_tokens=10)
    assert report.cached_layers == 2
    assert parity.same_greedy_tokens
    assert parity.max_abs_diff < 1e-5


def test_failure_leaves_nothing(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.exporters import OnnxExporter

    def fail(*_: object) -> None:
        raise RuntimeError("no such operator\nand many lines more")

    monkeypatch.setattr(OnnxExporter, "export", fail)
    with pytest.raises(ExportError, match="`LlamaForCausalLM` could not be exported") as caught:
        export_onnx(model_folder, tmp_path / "onnx")
    assert caught.value.why == "RuntimeError: no such operator"
    assert list(tmp_path.iterdir()) == []


def test_wrong_graph_is_never_delivered(
    model_folder: Path, onnx_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_ir

    def wrong(*_: object) -> onnx_ir.Model:
        graph = onnx_ir.load(onnx_folder / "model.onnx")
        for value in graph.graph.initializers.values():
            if value.shape is not None and len(value.shape) == 2:
                array = value.const_value.numpy()
                value.const_value = onnx_ir.tensor(array * 1.5)
        return graph

    monkeypatch.setattr(_trace, "trace", wrong)
    with pytest.raises(ExportError, match="differs from torch"):
        export_onnx(model_folder, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_interruption_leaves_nothing(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir

    def interrupt(graph: object, path: Path, **_: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_ir, "save", interrupt)
    monkeypatch.setattr(_trace, "trace", lambda *_: _tiny_graph())
    with pytest.raises(KeyboardInterrupt):
        export_onnx(model_folder, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def _tiny_graph() -> object:
    import onnx_ir

    return onnx_ir.Model(onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}), ir_version=10)


@pytest.mark.slow
def test_smollm2_continues_real_prompts_as_torch(tmp_path: Path) -> None:
    source = pytest.importorskip("prunekit.checkpoint.sources").resolve(
        "smollm2-135m-instruct", cache=tmp_path / "cache"
    )
    report = export_onnx(source.folder, tmp_path / "onnx")
    parity = compare_onnx(source.folder, tmp_path / "onnx")
    assert report.cached_layers == 30
    assert parity.ok
    assert parity.same_greedy_tokens
    assert parity.max_abs_diff < 1e-3
    shutil.rmtree(tmp_path / "onnx")
