"""Runs exported graphs in ONNX Runtime and compares them with torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunekit.core.errors import ExportError, UsageError
from prunekit.export._external import external_files
from prunekit.export._trace import has_encoder, is_decoder, load_for_graph, sample_inputs
from prunekit.modeling.kv_cache import cache_argument

if TYPE_CHECKING:
    import onnxruntime
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRAPH = "model.onnx"
# float32 noise between torch and ONNX Runtime was 1e-6 to 2e-5 of the largest output for dense models and up to
# 1.5e-4 for heavily pruned ones, whose activations are large; a lost mask or a wrong position gives 1e-2 and more.
REL_TOLERANCE = 5e-4


def providers(device: str | None = None) -> list[Any]:
    """Execution providers to ask for, best first.

    Args:
        device: `cpu`, `cuda` or `cuda:1`; None takes CUDA where this onnxruntime has it.
    Raises:
        UsageError: for a GPU that this onnxruntime cannot use.
    """
    import onnxruntime

    has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    if device is not None and device != "cpu" and not (device.startswith("cuda") and has_cuda):
        raise UsageError(
            f"this onnxruntime does not run on `{device}`",
            why=f"it has {', '.join(onnxruntime.get_available_providers())}",
            hint='use `--device cpu`, or pip install "prunekit[onnx-gpu]" for CUDA',
        )
    if device == "cpu" or not has_cuda:
        return ["CPUExecutionProvider"]
    if hasattr(onnxruntime, "preload_dlls"):
        # Finds the CUDA libraries that torch brought.
        onnxruntime.preload_dlls()
    number = int((device or "cuda").partition(":")[2] or 0)
    cuda = ("CUDAExecutionProvider", {"device_id": number}) if number else "CUDAExecutionProvider"
    return [cuda, "CPUExecutionProvider"]


def open_session(folder: Path, device: str | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime session on a folder's graph; as many threads as torch uses, none of them spinning.

    Args:
        folder: ONNX folder.
        device: as for `providers`.
    Raises:
        ExportError: if there is no graph, its weights lie elsewhere, or ONNX Runtime refuses it.
    """
    import onnxruntime
    import torch

    graph = folder / GRAPH
    if not graph.is_file():
        raise ExportError(f"`{folder}` has no `{GRAPH}`", hint=f"prunekit export {folder.parent} --format onnx")
    external_files(graph)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Waiting threads of ONNX Runtime and of torch would otherwise burn the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    asked = providers(device)
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=asked)
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot open `{graph}`", why=str(error).splitlines()[0]) from error


def is_decoder_graph(session: onnxruntime.InferenceSession) -> bool:
    """Whether a graph takes a KV cache."""
    return any(value.name.startswith("past_key_values.") for value in session.get_inputs())


class OrtDecoder:
    """Greedy generation with a KV cache on an exported decoder; the cache stays on the session's device.

    Args:
        folder: ONNX folder.
        session: of its graph where it is open already.
    """

    def __init__(self, folder: Path, session: onnxruntime.InferenceSession | None = None) -> None:
        self.session = session or open_session(folder)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.cache_inputs = [name for name in self.inputs if name.startswith("past_key_values.")]
        if not self.cache_inputs:
            raise ExportError(f"`{folder}` is no decoder with a KV cache", hint="use `run_encoder`")
        self.cache_outputs = [name.replace("past_key_values", "present") for name in self.cache_inputs]
        self.device = "cuda" if "CUDAExecutionProvider" in self.session.get_providers() else "cpu"
        settings = self.session.get_provider_options().get("CUDAExecutionProvider", {})
        self.device_number = int(settings.get("device_id", 0))

    def empty_cache(self, batch: int) -> dict[str, Any]:
        """Cache of no tokens, by input name."""
        import onnxruntime

        cache = {}
        for name in self.cache_inputs:
            value = self.inputs[name]
            # Layers of unequal width name their axis `kv_heads_<n>`.
            heads, width = (int(str(axis).rsplit("_", 1)[-1]) for axis in (value.shape[1], value.shape[3]))
            zeros = np.zeros((batch, heads, 0, width), _NUMPY[value.type])
            cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(zeros, self.device, self.device_number)
        return cache

    def step(self, input_ids: np.ndarray, attention_mask: np.ndarray, cache: dict[str, Any]) -> np.ndarray:
        """Logits of new tokens; `cache` is replaced by the longer one.

        Args:
            input_ids: int64 [batch, new].
            attention_mask: int64 [batch, past + new], zeros where padded on the left.
            cache: from `empty_cache` or the step before.

        Returns:
            float32 [batch, new, vocabulary].
        """
        new = input_ids.shape[1]
        positions = np.clip(np.cumsum(attention_mask, axis=1) - 1, 0, None)[:, -new:]
        feed = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
        binding = self.session.io_binding()
        for name, array in feed.items():
            if name in self.inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=np.int64))
        for name, past in cache.items():
            binding.bind_ortvalue_input(name, past)
        binding.bind_output("logits", "cpu")
        for name in self.cache_outputs:
            binding.bind_output(name, self.device, self.device_number)
        self.session.run_with_iobinding(binding)
        names = ["logits", *self.cache_outputs]
        found = dict(zip(names, binding.get_outputs(), strict=True))
        for taken, given in zip(self.cache_inputs, self.cache_outputs, strict=True):
            cache[taken] = found[given]
        return np.asarray(found["logits"].numpy(), dtype=np.float32)

    def generate(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, new_tokens: int, stop: Sequence[int] = ()
    ) -> np.ndarray:
        """Greedy continuation.

        Args:
            input_ids: int64 [batch, length], padded on the left.
            attention_mask: int64 [batch, length].
            new_tokens: tokens to make, at least 1.
            stop: end-of-text ids; a row that met one repeats it.

        Returns:
            int64 [batch, at most new_tokens], without the prompt.
        """
        cache = self.empty_cache(len(input_ids))
        mask, ids = attention_mask, input_ids
        made: list[np.ndarray] = []
        done = np.zeros(len(input_ids), dtype=bool)
        for _ in range(new_tokens):
            best = np.asarray(self.step(ids, mask, cache)[:, -1].argmax(-1))
            best = np.where(done, made[-1][:, 0] if made else best, best)
            made.append(best.reshape(-1, 1))
            done |= np.isin(best, list(stop))
            if done.all():
                break
            ids = made[-1]
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
        return np.concatenate(made, axis=1)


_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


def run_encoder(session: onnxruntime.InferenceSession, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """First output of an encoder graph: hidden states or logits, float32."""
    names = {value.name for value in session.get_inputs()}
    feed = {name: array for name, array in inputs.items() if name in names}
    return np.asarray(session.run([session.get_outputs()[0].name], feed)[0], dtype=np.float32)


@dataclass(frozen=True)
class OnnxParity:
    """How close ONNX Runtime comes to torch.

    Args:
        max_abs_diff: largest difference of logits or hidden states on positions that are not padding.
        max_abs: largest absolute value of torch's outputs there.
        same_greedy_tokens: whether the greedy continuations are equal; None for encoders.
        n_tokens: tokens compared one by one, 0 for encoders.
        tie_gap: where continuations part, how much larger torch's logit of its own token was; 0 where they do not.
        file_bytes: of the ONNX folder's graph and weights.
        providers: what the session ran on.
    """

    max_abs_diff: float
    max_abs: float
    same_greedy_tokens: bool | None
    n_tokens: int
    tie_gap: float
    file_bytes: int
    providers: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        """Largest difference that counts as float32 noise."""
        return REL_TOLERANCE * max(1.0, self.max_abs)

    @property
    def ok(self) -> bool:
        """Whether outputs agree, and tokens part nowhere but at a tie within the noise."""
        return self.max_abs_diff <= self.tolerance and self.tie_gap <= 2 * self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"providers": list(self.providers)}


PROMPTS = (
    "The capital of France is",
    "Water boils at one hundred degrees Celsius, and it freezes at",
    "Once upon a time there was a small village near the sea, where",
)


def compare_onnx(
    model_folder: Path, onnx_folder: Path, prompts: Sequence[str] = PROMPTS, *, new_tokens: int = 16
) -> OnnxParity:
    """Compares an ONNX folder with the checkpoint it was made from, torch first, then ONNX Runtime.

    Args:
        model_folder: checkpoint folder.
        onnx_folder: what `export_onnx` wrote.
        prompts: texts, run as one padded batch; a model without a tokenizer gets random ids or pixels instead.
        new_tokens: greedy tokens a prompt; decoders only.
    """
    from prunekit.modeling.load import load_tokenizer

    model = load_for_graph(model_folder)
    inputs = prompt_inputs(model, load_tokenizer(model_folder), prompts)
    stop = model.generation_config.eos_token_id if model.can_generate() else None
    ends = () if stop is None else tuple(stop) if isinstance(stop, list) else (stop,)
    return compare_loaded(model, inputs, onnx_folder, new_tokens, ends)


def prompt_inputs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, prompts: Sequence[str], max_tokens: int = 64
) -> dict[str, torch.Tensor]:
    """Prompts as one padded batch: on the left for decoders, on the right for encoders; random inputs for others.

    Returns:
        As `sample_inputs`.
    """
    import torch

    if tokenizer is None or model.main_input_name == "pixel_values" or has_encoder(model) or not prompts:
        return sample_inputs(model, batch=3, length=12, pad=5, seed=2)
    rows = [tokenizer(text)["input_ids"][:max_tokens] for text in prompts]
    length = max(len(row) for row in rows)
    fill = tokenizer.pad_token_id or 0
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if is_decoder(model) else slice(0, len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in sample_inputs(model, batch=1, length=1):
        inputs["token_type_ids"] = torch.zeros_like(ids)
    return inputs


def compare_loaded(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    onnx_folder: Path,
    new_tokens: int,
    stop: Sequence[int] = (),
) -> OnnxParity:
    """Compares an ONNX folder with a model in memory.

    Args:
        model: float32, in eval mode.
        inputs: as from `prompt_inputs`.
        onnx_folder: what `export_onnx` wrote.
        new_tokens: greedy tokens a row; decoders only.
        stop: end-of-text ids.
    """
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    same: bool | None = None
    gap, n_tokens = 0.0, 0
    if is_decoder(model):
        steps, tokens = _torch_greedy(model, inputs, new_tokens, stop)
        expected, n_tokens = steps[0], int(tokens.size)
        runner = OrtDecoder(onnx_folder)
        session = runner.session
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        found = runner.step(ids, mask, runner.empty_cache(len(ids)))
        same, gap = _same_tokens(tokens, runner.generate(ids, mask, new_tokens, stop), steps)
    else:
        expected = _torch_output(model, inputs)
        session = open_session(onnx_folder)
        found = run_encoder(session, arrays)
    if found.shape != expected.shape:
        raise ExportError(f"ONNX Runtime gives {list(found.shape)}, torch {list(expected.shape)}", hint="export again")
    if "attention_mask" in arrays and expected.shape[:2] == arrays["attention_mask"].shape:
        valid = arrays["attention_mask"].astype(bool)
        found, expected = found[valid], expected[valid]
    graph = onnx_folder / GRAPH
    return OnnxParity(
        max_abs_diff=float(np.abs(found - expected).max()),
        max_abs=float(np.abs(expected).max()),
        same_greedy_tokens=same,
        n_tokens=n_tokens,
        tie_gap=gap,
        file_bytes=sum(file.stat().st_size for file in (graph, *external_files(graph))),
        providers=tuple(session.get_providers()),
    )


def _torch_output(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return np.asarray(model(**inputs)[0].float().numpy())


def _torch_greedy(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], new_tokens: int, stop: Sequence[int]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of every step (the first over the whole prompt) and the tokens; no sampling rule of the model applies."""
    import torch
    from transformers import DynamicCache

    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache, name, steps = DynamicCache(), cache_argument(model), []
    made: list[torch.Tensor] = []
    done = torch.zeros(len(ids), dtype=torch.bool)
    for _ in range(new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{name: cache})
        steps.append(out.logits.float().numpy())
        best = out.logits[:, -1].argmax(-1)
        best = torch.where(done, made[-1][:, 0], best) if made else best
        made.append(best[:, None])
        done |= torch.isin(best, torch.tensor(list(stop), dtype=best.dtype))
        if bool(done.all()):
            break
        ids = made[-1]
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return steps, torch.cat(made, dim=1).numpy()


def _same_tokens(expected: np.ndarray, found: np.ndarray, steps: Sequence[np.ndarray]) -> tuple[bool, float]:
    """Whether tokens are equal, and the largest logit gap where a row first parts."""
    length = min(expected.shape[1], found.shape[1])
    gap = 0.0
    for row in range(len(expected)):
        apart = np.flatnonzero(expected[row, :length] != found[row, :length])
        if len(apart):
            first = int(apart[0])
            logits = steps[first][row, -1]
            gap = max(gap, float(logits[expected[row, first]] - logits[found[row, first]]))
    return bool(gap == 0.0 and np.array_equal(expected[:, :length], found[:, :length])), gap
