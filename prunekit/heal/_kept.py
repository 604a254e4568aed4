"""Things that the teacher said and that are kept on disk: written whole, in parts, once for all processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import HealError
from prunekit.core.files import atomic_folder, write_json

if TYPE_CHECKING:
    from torch import Tensor

_TABLE = "parts.json"


def key_of(**facts: Any) -> str:
    """SHA-256 of what something was made from; tensors count by their values."""
    plain = {name: value if isinstance(value, str | int | float | None) else bytes_digest(value)
             for name, value in facts.items()}  # fmt: skip
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def bytes_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's shape and values."""
    return hashlib.sha256(str(tensor.shape).encode() + tensor.contiguous().numpy().tobytes()).hexdigest()


def kept(folder: Path, make: Callable[[], Iterable[Mapping[str, Tensor]]]) -> list[Path]:
    """Files of a folder, made first where it is missing; processes that ask at the same time wait for the first.

    Args:
        folder: in the cache.
        make: gives the parts, a file each.
    Raises:
        HealError: if the cache cannot be written to.
    """
    from filelock import FileLock
    from safetensors.torch import save_file

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not _whole(folder):
                with atomic_folder(folder, overwrite=True) as fresh:
                    sizes = {}
                    for number, part in enumerate(make()):
                        file = fresh / f"part-{number:05d}.safetensors"
                        save_file(dict(part), file)
                        sizes[file.name] = file.stat().st_size
                    write_json(fresh / _TABLE, sizes)
    except OSError as error:
        raise HealError(
            f"cannot write to the cache folder `{folder.parent}`",
            why=error.strerror or str(error),
            hint="set PRUNEKIT_CACHE to a folder with room that you may write to",
        ) from error
    return [folder / name for name in sorted(_sizes(folder))]


def parts(files: Iterable[Path]) -> Iterator[dict[str, Tensor]]:
    """Content of the files, one in memory at a time.

    Raises:
        HealError: if one is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for file in files:
        try:
            yield load_file(file)
        except (OSError, SafetensorError) as error:
            raise HealError(
                f"`{file.parent}` is damaged", why=str(error), hint="delete that folder; it is made again"
            ) from error


def _whole(folder: Path) -> bool:
    sizes = _sizes(folder)
    files = {name: folder / name for name in sizes}
    return bool(sizes) and all(f.is_file() and f.stat().st_size == sizes[name] for name, f in files.items())


def _sizes(folder: Path) -> dict[str, int]:
    try:
        found = json.loads((folder / _TABLE).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
