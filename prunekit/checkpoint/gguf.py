"""GGUF files as Hugging Face folders: converted once, in a process of their own, kept in the cache.

transformers unpacks a GGUF file only into a whole model, so the conversion holds all of it in memory; the process of
its own gives that memory back and keeps the loader's bars and logs off the terminal.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from prunekit.checkpoint.cache import cached
from prunekit.core.errors import CheckpointError
from prunekit.core.files import sha256_file
from prunekit.core.progress import NULL_PROGRESS, Progress

CONVERTER_VERSION = 1
_MAGIC = b"GGUF"


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF files do."""
    try:
        with file.open("rb") as opened:
            return opened.read(4) == _MAGIC
    except OSError:
        return False


def converted(file: Path, cache: Path, dtype: str = "float32", progress: Progress = NULL_PROGRESS) -> Path:
    """Folder with the weights of a GGUF file as safetensors, its tokenizer, chat template and generation config.

    Args:
        cache: holds one folder for each content of a file, whatever the file is called.
        dtype: of the unpacked weights.
    Raises:
        CheckpointError: if the file is damaged, or of an architecture that transformers does not read from GGUF.
    """
    if not is_gguf(file):
        raise CheckpointError(f"`{file}` is not a GGUF file", why="it does not begin with the bytes `GGUF`")
    folder = cache / "gguf" / f"{sha256_file(file)[:24]}-{dtype}-v{CONVERTER_VERSION}"
    return cached(folder, lambda fresh: write_converted(file, fresh, dtype, progress))


def write_converted(file: Path, folder: Path, dtype: str = "float32", progress: Progress = NULL_PROGRESS) -> None:
    """Converts a GGUF file into `folder`, in a process of its own.

    Raises:
        CheckpointError: if that process fails.
    """
    if importlib.util.find_spec("gguf") is None:
        why = "the package `gguf` is not installed"
        raise CheckpointError(f"cannot read `{file.name}`", why=why, hint="pip install 'prunekit[gguf]'")
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-m", "prunekit.checkpoint.gguf", str(file.resolve()), str(folder.resolve()), dtype]
    with (
        progress.task(f"converting {file.name}", total=1.0) as task,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
        ) as child,
    ):
        try:
            problem, last, done = "", deque[str](maxlen=1), 0.0
            for line in child.stdout or ():
                said = _message(line)
                if said is None:
                    last.append(line.strip())
                elif "share" in said:
                    task.advance(said["share"] - done)
                    done = said["share"]
                else:
                    problem = said["problem"]
            code = child.wait()
        except BaseException:
            child.kill()
            raise
    if code != 0 or problem:
        why = problem or f"the converter ended with code {code}" + (f": {last[0]}" if last else "")
        raise CheckpointError(f"cannot convert `{file.name}`", why=why, at=str(file))


def _message(line: str) -> dict[str, Any] | None:
    """What the converter meant for its parent; None for a line that some library printed."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    return said if isinstance(said, dict) and ("share" in said or "problem" in said) else None


def _say(**message: object) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _convert(file: Path, folder: Path, dtype: str) -> None:
    import torch
    import transformers.modeling_gguf_pytorch_utils as loader
    from transformers import AutoConfig, AutoTokenizer, GgufConfig
    from transformers.models.auto import modeling_auto

    def counted(items: Iterable[Any], **_: object) -> Iterator[Any]:
        listed = list(items)
        for number, item in enumerate(listed, 1):
            yield item
            _say(share=0.1 + 0.7 * number / len(listed))

    # The loader's only loop over tensors; this process does nothing else with it.
    if hasattr(loader, "tqdm"):
        loader.tqdm = counted
    where: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    config = AutoConfig.from_pretrained(**where)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    _say(share=0.1)
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    auto = modeling_auto.AutoModelForCausalLM if causal else modeling_auto.AutoModel
    unpack = GgufConfig(dequantize=True)
    model, report = auto.from_pretrained(
        **where, quantization_config=unpack, dtype=getattr(torch, dtype), output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"it holds no weights for `{missing[0]}`{more}; a part of a split file cannot be read alone")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _write_portable_tokenizer_config(folder / "tokenizer_config.json")
    _write_usual_modes(folder)
    _say(share=1.0)


def _write_portable_tokenizer_config(file: Path) -> None:
    """Names the tokenizer's class as transformers 4 and 5 both know it, and drops how this process loaded it."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only"):
        settings.pop(key, None)
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_usual_modes(folder: Path) -> None:
    """Gives every file the mode that new files have; safetensors writes its own for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)


def _main(file: str, folder: str, dtype: str) -> int:
    try:
        _convert(Path(file), Path(folder), dtype)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        _say(problem=text[:300])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
