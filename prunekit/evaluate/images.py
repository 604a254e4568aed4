"""Labelled images from a zip file or a folder: `<class>/<name>.jpg`."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Mean and standard deviation of ImageNet's colours, red, green, blue.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# One picture of a data set; more was made to fill memory.
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Picture:
    """An image file and its class.

    Args:
        at: where it stands, for messages.
        label: name of its class.
        content: the file's bytes.
    """

    at: str
    label: str
    content: bytes

    @property
    def fields(self) -> dict[str, Any]:
        """What goes into a digest."""
        return {"label": self.label, "content": self.content}


def read_images(path: str, limit: int | None = None) -> list[Picture]:
    """Images of a zip file or a folder; the folder above an image is its class.

    Args:
        path: zip file or folder.
        limit: images read at most, as many of each class as of the others; None reads all.
    Raises:
        UsageError: when there is no such file or folder, it is damaged, or it holds no image.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        names = {file.relative_to(place).as_posix(): file for file in place.rglob("*")}
        chosen = _chosen(list(names), limit, path)
        return [Picture(f"{path}/{n}", PurePosixPath(n).parent.name, _small(names[n], path)) for n in chosen]
    if not place.is_file():
        raise UsageError(f"no images at `{path}`", why="images are a zip file or a folder, one folder a class")
    try:
        with zipfile.ZipFile(place) as opened:
            sizes = {info.filename: info.file_size for info in opened.infolist() if not info.is_dir()}
            chosen = _chosen(list(sizes), limit, path)
            large = next((name for name in chosen if sizes[name] > _MOST_BYTES), None)
            if large is not None:
                raise UsageError(f"`{large}` is no image", why="it is too large", at=path)
            return [Picture(f"{path}:{n}", PurePosixPath(n).parent.name, opened.read(n)) for n in chosen]
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"`{path}` is not a zip file that can be read", why=str(error)) from error


def _small(file: Path, path: str) -> bytes:
    if file.stat().st_size > _MOST_BYTES:
        raise UsageError(f"`{file}` is no image", why="it is too large", at=path)
    return file.read_bytes()


def _chosen(names: list[str], limit: int | None, path: str) -> list[str]:
    """Names of images, in turn from every class, each class by name."""
    classes: dict[str, list[str]] = {}
    for name in sorted(names):
        if PurePosixPath(name).suffix.lower() in SUFFIXES and PurePosixPath(name).parent.name:
            classes.setdefault(PurePosixPath(name).parent.name, []).append(name)
    if not classes:
        why = f"an image lies in its class's folder and ends in {', '.join(SUFFIXES)}"
        raise UsageError(f"`{path}` holds no images", why=why)
    return list(_in_turn(list(classes.values())))[:limit]


def _in_turn(groups: list[list[str]]) -> Iterator[str]:
    for place in range(max(map(len, groups))):
        yield from (group[place] for group in groups if place < len(group))


def colours(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that a model's images are normalised by: its preprocessor's, else ImageNet's."""
    try:
        found = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        return tuple(map(float, found["image_mean"])), tuple(map(float, found["image_std"]))
    except (OSError, ValueError, KeyError, TypeError):
        return _MEAN, _STD


def pixels(picture: Picture, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """An image resized to a square (bicubic) and normalised, float32 [3, size, size].

    Raises:
        UsageError: if it is no image.
    """
    import numpy as np
    import torch
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(picture.content)) as opened:
            image = opened.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UsageError("a file is no image that can be read", why=str(error), at=picture.at) from error
    scaled = np.asarray(image, dtype=np.float32) / 255.0
    values = (scaled - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))
