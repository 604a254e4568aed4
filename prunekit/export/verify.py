"""Proves that a written folder loads and computes what it should: fresh processes, with and without prunekit."""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from prunekit.checkpoint.reader import Checkpoint
from prunekit.core.errors import PrunekitError
from prunekit.core.files import sha256_file, write_json
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.export.ort import GRAPH, PROMPTS, compare_loaded, prompt_inputs
from prunekit.runtime.attention.masked import mask_by_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MODELING_FILE = "modeling_prunekit.py"
# Files that a folder brings to be loaded without prunekit: of heterogeneous folders, and of DeciLM ones.
_OWN_FILES = {"prunekit": (MODELING_FILE,), "nemotron-nas": ("configuration_decilm.py", "modeling_decilm.py")}
# float64 in both: the same sums, so next to nothing. float32 in one of them: 1e-6 to 1.5e-4 of the largest output was
# measured, the larger figures on heavily pruned models; a lost weight or a stale position gives 1e-2 and more.
REL_TOLERANCE = {"float64": 1e-9, "float32": 5e-4}
# Above this many parameters children compute in float32, to stay within the memory of the machine that made the model.
FLOAT64_PARAMS = 400_000_000
_CODES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
_CHILD = Path(__file__).with_name("_child.py")


@dataclass(frozen=True)
class Reference:
    """What a model should compute.

    Args:
        inputs: keyword inputs of the model, as from `prompt_inputs`.
        outputs: logits or hidden states, first of the model's outputs.
        name: of where they come from.
    """

    inputs: Mapping[str, torch.Tensor]
    outputs: torch.Tensor
    name: str = "the model in memory"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: what, in a few words.
        passed: whether it holds.
        detail: the figure or the reason.
    """

    name: str
    passed: bool
    detail: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """All checks of a folder.

    Args:
        folder: what was checked.
        checks: in the order they were made.
        max_abs_diff: largest difference from the reference in a fresh process, None where none could be computed.
        onnx_max_abs_diff: largest difference of the ONNX graph from torch, None where there is none.
    """

    folder: Path
    checks: tuple[Check, ...]
    max_abs_diff: float | None = None
    onnx_max_abs_diff: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def problems(self) -> tuple[str, ...]:
        """Failed checks as text."""
        return tuple(f"{c.name}: {c.detail}" if c.detail else c.name for c in self.checks if not c.passed)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "ok": self.ok,
            "max_abs_diff": self.max_abs_diff,
            "onnx_max_abs_diff": self.onnx_max_abs_diff,
            "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks],
            "problems": list(self.problems),
        }


def make_reference(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "the model in memory"
) -> Reference:
    """Outputs of a model in memory on a small padded batch.

    Args:
        model: in eval mode; float64 makes the comparison strict.
        tokenizer: encodes the prompts; random ids without it.
        name: see `Reference`.
    """
    inputs = prompt_inputs(model, tokenizer, PROMPTS)
    with torch.no_grad():
        return Reference(inputs, model(**inputs)[0].contiguous(), name)


def verify(
    folder: Path,
    reference: Path | Reference | None = None,
    *,
    new_tokens: int = 8,
    timeout_s: float = 900,
    progress: Progress = NULL_PROGRESS,
) -> VerifyReport:
    """Loads a folder in fresh processes and compares what it computes.

    A stock folder is loaded once beside prunekit and once where prunekit cannot be imported. A heterogeneous one is
    loaded by `import prunekit`, and without prunekit by its own modeling file under `trust_remote_code`, after that
    file was found equal to prunekit's. A DeciLM one is loaded in the second way alone.

    Args:
        folder: checkpoint folder; ONNX files are expected in its `onnx` folder, if anywhere.
        reference: what it should compute: a folder, or outputs of a model in memory. Without it the fresh processes
            must agree with the model as this process loads it.
        new_tokens: greedy tokens to compare with cache, without cache and without padding.
        timeout_s: most seconds a process may take.
        progress: told of each process.

    Returns:
        The checks; failed ones are no exception.
    """
    checks: list[Check] = []
    try:
        checkpoint = Checkpoint.open(folder)
        expected, onnx_diff = _expected(folder, reference, checks)
    except PrunekitError as error:
        checks.append(Check("the folder can be read", False, " · ".join(t for t in (str(error), error.why) if t)))
        return VerifyReport(folder, tuple(checks))
    checks.insert(0, Check("the folder can be read", True, f"{len(checkpoint.tensors)} tensors"))
    checks.append(_dtype_check(checkpoint))
    gc.collect()
    ways = ["prunekit", "plain"]
    if _code(checkpoint.config):
        # prunekit registers its own model types; DeciLM's it only writes.
        ways = ["prunekit"] if _heterogeneous(checkpoint.config) else []
        ways += ["remote_code"] if _own_files(folder, checkpoint.config, checks) else []
    dtype = "float64" if _n_params(checkpoint) <= FLOAT64_PARAMS else "float32"
    answers: dict[str, dict[str, Any]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="prunekit-verify-") as scratch,
        progress.task("loading in fresh processes", total=len(ways), unit="processes") as task,
    ):
        for way in ways:
            answers[way] = _ask(way, folder, checkpoint.config, expected, dtype, new_tokens, timeout_s, Path(scratch))
            task.advance(1)
    diffs = [_process_checks(way, answers[way], expected, dtype, checkpoint.config, checks) for way in ways]
    _agreement_check(answers, expected, dtype, checks)
    known = [diff for diff in diffs if diff is not None]
    return VerifyReport(folder, tuple(checks), max(known, default=None), onnx_diff)


def _expected(folder: Path, reference: Path | Reference | None, checks: list[Check]) -> tuple[Reference, float | None]:
    """The reference, and the ONNX difference where there is a graph; the model is gone from memory afterwards."""
    from prunekit.modeling.load import load_model, load_tokenizer

    onnx_folder = folder / "onnx"
    has_onnx = (onnx_folder / GRAPH).is_file()
    expected = reference if isinstance(reference, Reference) else None
    if isinstance(reference, Path):
        expected = make_reference(load_model(reference), load_tokenizer(reference), f"`{reference}`")
    if expected is not None and not has_onnx:
        return expected, None
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    if expected is None:
        expected = make_reference(model, tokenizer, "the folder as loaded here")
    if not has_onnx:
        return expected, None
    try:
        # The reference reads every key, as the folder does where it is loaded without a pattern; the graph does not.
        mask_by_pattern(model)
        parity = compare_loaded(model, prompt_inputs(model, tokenizer, PROMPTS), onnx_folder, new_tokens=16)
    except PrunekitError as error:
        checks.append(Check("onnx computes what torch does", False, str(error)))
        return expected, None
    detail = f"max abs diff {parity.max_abs_diff:.3g} of {parity.max_abs:.3g}"
    if parity.same_greedy_tokens is not None:
        detail += f", {parity.n_tokens} greedy tokens " + ("equal" if parity.same_greedy_tokens else "part")
        detail += f" at a gap of {parity.tie_gap:.3g}" if parity.tie_gap else ""
    checks.append(Check("onnx computes what torch does", parity.ok, detail))
    return expected, parity.max_abs_diff


def _heterogeneous(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type", "")).startswith("prunekit_")


def _code(config: Mapping[str, Any]) -> str:
    """Key of `_OWN_FILES` of a folder that needs code of its own, "" where it needs none."""
    kind = "prunekit" if _heterogeneous(config) else str(config.get("model_type", ""))
    return kind if kind in _OWN_FILES else ""


def _n_params(checkpoint: Checkpoint) -> int:
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def _dtype_check(checkpoint: Checkpoint) -> Check:
    """The configuration's dtype against that of most bytes."""
    held: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        held[info.dtype] = held.get(info.dtype, 0) + info.n_bytes
    most = max(held, key=lambda code: held[code], default="none")
    claimed = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if claimed is None:
        return Check("dtype is the configuration's", True, f"{most}; the configuration names none")
    return Check("dtype is the configuration's", _CODES.get(str(claimed)) == most, f"{most}, configured {claimed}")


def _own_files(folder: Path, config: Mapping[str, Any], checks: list[Check]) -> bool:
    """Whether the folder's modeling files are prunekit's, byte for byte, so that running them is no risk."""
    import prunekit.modeling

    home, good = Path(prunekit.modeling.__path__[0]), True
    for name in _OWN_FILES[_code(config)]:
        file = folder / name
        same = file.is_file() and not file.is_symlink() and sha256_file(file) == sha256_file(home / name)
        detail = "" if same else "it is not run; write the folder again with this version of prunekit"
        checks.append(Check(f"{name} is prunekit's", same, detail))
        good = good and same
    return good


def _ask(
    way: str,
    folder: Path,
    config: Mapping[str, Any],
    expected: Reference,
    dtype: str,
    new_tokens: int,
    timeout_s: float,
    scratch: Path,
) -> dict[str, Any]:
    """Answer of a fresh process; `error` in it where there is none. `outputs` is a tensor."""
    place = scratch / way
    place.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in expected.inputs.items()}, place / "inputs.safetensors")
    texts = list(PROMPTS) if (folder / "tokenizer_config.json").is_file() else []
    auto = next((name for name in reversed(list(config.get("auto_map") or ())) if name != "AutoConfig"), "")
    request = {
        "sys_path": _import_path(),
        "folder": str(folder.resolve()),
        "way": way,
        "architecture": (list(config.get("architectures") or ()) or [""])[0],
        "auto_class": auto if _code(config) else "",
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "texts": texts,
        "new_tokens": new_tokens,
        **{name: str(place / f"{name}.{end}") for name, end in _EXCHANGED.items()},
    }
    write_json(place / "request.json", request)
    # Compiled copies of a folder's modeling file go to the scratch folder, and nothing is fetched.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
    environment |= {"OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-I", str(_CHILD), str(place / "request.json")]
    try:
        done = subprocess.run(
            command, env=environment, cwd=place, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        return {"error": f"the process took more than {timeout_s:g} seconds"}
    result = Path(request["result"])
    if done.returncode or not result.is_file():
        said = done.stderr.decode(errors="replace").strip().splitlines()
        return {"error": f"the process ended with code {done.returncode}" + (f": {said[-1][:300]}" if said else "")}
    answer: dict[str, Any] = json.loads(result.read_text("utf-8"))
    if "error" not in answer:
        answer["outputs"] = load_file(request["outputs"])["outputs"]
    return answer


def _import_path() -> list[str]:
    """This process's import path, absolute, and where prunekit lies."""
    import prunekit

    found = [Path(entry or os.getcwd()).resolve() for entry in sys.path]
    found.append(Path(prunekit.__path__[0]).resolve().parent)
    return list(dict.fromkeys(str(entry) for entry in found if entry.exists()))


_EXCHANGED = {"inputs": "safetensors", "outputs": "safetensors", "result": "json"}
_WAYS = {"prunekit": "with prunekit", "plain": "without prunekit", "remote_code": "by its own modeling file"}


def _process_checks(
    way: str,
    answer: Mapping[str, Any],
    expected: Reference,
    dtype: str,
    config: Mapping[str, Any],
    checks: list[Check],
) -> float | None:
    """Adds the checks of one process; returns its difference from the reference."""
    how = _WAYS[way]
    if "error" in answer:
        checks.append(Check(f"loads {how}", False, answer["error"]))
        return None
    wrong = [f"{len(keys)} {kind} (`{keys[0]}`)" for kind, keys in _labelled(answer["keys"]) if keys]
    checks.append(Check(f"loads {how}", not wrong, ", ".join(wrong) or answer["class"]))
    if "refused_untrusted" in answer:
        checks.append(Check("does not load by mistake", answer["refused_untrusted"], "without trust_remote_code"))
    diff, passed, detail = _difference(expected.outputs, answer["outputs"], dtype, expected.inputs)
    checks.append(Check(f"computes the same {how}", passed, f"{detail}, against {expected.name}"))
    if "cached" in answer:
        for other, name in (("uncached", "cache and no cache"), ("alone", "left padding and none")):
            same = answer["cached"] == answer[other]
            detail = f"{sum(map(len, answer['cached']))} greedy tokens, {dtype}"
            checks.append(Check(f"{name} agree {how}", same, detail))
        kv_heads = expected_kv_heads(config)
        if kv_heads is not None:
            detail = f"{len(answer['kv_heads'])} layers with a cache, expected {len(kv_heads)}"
            checks.append(Check(f"cache holds what attention needs {how}", answer["kv_heads"] == kv_heads, detail))
    if "tied" in answer:
        detail = "tied" if answer["tied"] else "not tied"
        checks.append(
            Check(f"embeddings are tied as configured {how}", answer["tied"] == answer["tie_expected"], detail)
        )
    if "token_ids" in answer:
        same = answer["token_ids"] == answer["token_ids_again"] and all(answer["token_ids"])
        detail = f"{sum(map(len, answer['token_ids']))} tokens" + (", chat template" if answer["chat"] else "")
        checks.append(Check(f"tokenizer round trip {how}", same, detail))
    return diff


def _labelled(keys: Mapping[str, Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    return [(kind.replace("_", " "), found) for kind, found in keys.items()]


def _difference(
    a: torch.Tensor, b: torch.Tensor, dtype: str, inputs: Mapping[str, torch.Tensor]
) -> tuple[float | None, bool, str]:
    """Largest difference outside padding, whether it is noise, and both as text."""
    if a.shape != b.shape:
        return None, False, f"shape {list(b.shape)} instead of {list(a.shape)}"
    mask = inputs.get("attention_mask")
    if mask is not None and a.shape[:2] == mask.shape:
        a, b = a[mask.bool()], b[mask.bool()]
    wide = a.dtype == torch.float64 and b.dtype == torch.float64 and dtype == "float64"
    a, b = a.double(), b.double()
    diff, largest = float((a - b).abs().max()), float(a.abs().max())
    limit = REL_TOLERANCE["float64" if wide else "float32"] * max(1.0, largest)
    # A NaN fails: it compares false.
    return diff, diff <= limit, f"max abs diff {diff:.3g} of {largest:.3g}"


def expected_kv_heads(config: Mapping[str, Any]) -> list[int] | None:
    """KV heads of each layer that must hold a cache, from a configuration; None where it does not say."""
    if config.get("is_encoder_decoder"):
        return _decoder_heads(config)
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    heads = config.get("num_attention_heads", config.get("n_head"))
    heads = config.get("num_key_value_heads") or heads
    if blocks is None or heads is None:
        return None
    if _code(config) == "nemotron-nas":
        parts = [entry["attention"] for entry in config["block_configs"]]
        return [config["num_attention_heads"] // part["n_heads_in_group"] for part in parts if not part["no_op"]]
    section = config.get("prunekit") if _heterogeneous(config) else None
    layers = {int(key): value for key, value in ((section or {}).get("per_layer_config") or {}).items()}
    kept = [layers.get(i, {}) for i in range(blocks)]
    shared = "num_key_value_heads" in config
    name = "num_key_value_heads" if shared else "num_attention_heads"
    return [int(layer.get(name, heads)) for layer in kept if "attention" not in layer.get("skip", ())]


def _decoder_heads(config: Mapping[str, Any]) -> list[int] | None:
    """The same for the decoder of a model with an encoder too."""
    blocks = config.get("decoder_layers") or config.get("num_decoder_layers") or config.get("num_layers")
    heads = config.get("decoder_attention_heads") or config.get("num_heads")
    if blocks is None or heads is None:
        return None
    layers = (config.get("prunekit") or {}).get("per_layer_config") or {}
    own = {int(key.removeprefix("decoder.")): layer for key, layer in layers.items() if key.startswith("decoder.")}
    kept = [own.get(i, {}) for i in range(blocks)]
    return [int(layer.get("num_attention_heads", heads)) for layer in kept if "attention" not in layer.get("skip", ())]


def _agreement_check(
    answers: Mapping[str, Mapping[str, Any]], expected: Reference, dtype: str, checks: list[Check]
) -> None:
    """With and without prunekit must agree in outputs and tokens, where both loaded."""
    good = [answer for answer in answers.values() if "error" not in answer]
    if len(good) < 2:
        return
    _, passed, detail = _difference(good[0]["outputs"], good[1]["outputs"], dtype, expected.inputs)
    passed = passed and good[0].get("cached") == good[1].get("cached")
    passed = passed and good[0].get("token_ids") == good[1].get("token_ids")
    checks.append(Check("with and without prunekit agree", passed, detail))
