"""Weights that only unpickling would read: recognised by their names and refused, never opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prunekit.core.errors import CheckpointError

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Pickles that lie beside weights and are none.
_BESIDE = ("training_args", "optimizer", "scheduler", "rng_state")


def find_pickle(names: Iterable[str]) -> str | None:
    """First name that reads like pickled weights, or like their index."""
    ends = (*SUFFIXES, ".bin.index.json")
    return min((name for name in names if name.endswith(ends) and not name.startswith(_BESIDE)), default=None)


def refusal(name: str, at: str = "") -> CheckpointError:
    """The error for weights that only unpickling would read, with the way out."""
    return CheckpointError(
        f"`{name}` is a pickle, which prunekit never opens",
        why="loading a pickle may run any code",
        hint="convert it to safetensors: huggingface.co/spaces/safetensors/convert, or in a sandbox with "
        "torch.load(..., weights_only=True) and safetensors.torch.save_file",
        at=at,
    )


def require_safetensors(folder: Path, elsewhere: Iterable[str] = ()) -> None:
    """Refuses a folder without safetensors weights, saying what it holds instead.

    Args:
        elsewhere: names of files that belong to the folder and were not downloaded.
    Raises:
        CheckpointError: if there is no safetensors file and no index of some.
    """
    if any(folder.glob("*.safetensors")) or (folder / "model.safetensors.index.json").exists():
        return
    names = sorted({file.name for file in folder.iterdir() if file.is_file()}.union(elsewhere))
    pickle = find_pickle(names)
    if pickle is not None:
        raise refusal(pickle, at=str(folder))
    gguf = next((name for name in names if name.endswith(".gguf")), None)
    if gguf is not None:
        raise CheckpointError(f"`{folder}` holds no safetensors", hint=f"name the GGUF file: {folder / gguf}")
    raise CheckpointError(f"`{folder}` holds no weights", why="there is no `.safetensors` file in it")
