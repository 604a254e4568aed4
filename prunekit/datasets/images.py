"""Images out of data set cells."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
# Larger sides than this are no photographs; decoding them would only fill memory.
_MOST_PIXELS = 1 << 27


def decode(value: Any, folder: Path) -> Image:
    """An image as RGB.

    Args:
        value: bytes of a file, its path below `folder`, or the mapping with `bytes` and `path` that Hugging Face
            datasets store.
        folder: where relative paths begin; nothing outside it is opened.
    Raises:
        OSError: if the file cannot be read or is no image.
        ValueError: if the cell holds no image, or one that is too large or outside the folder.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        file = (folder / value).resolve()
        if not file.is_relative_to(folder.resolve()):
            raise ValueError("its path leads out of the data set's folder")
        value = file.read_bytes()
    if not isinstance(value, bytes):
        raise ValueError("the cell holds no image")
    try:
        with Image.open(io.BytesIO(value)) as opened:
            width, height = opened.size
            if width * height > _MOST_PIXELS:
                raise ValueError(f"{width} x {height} pixels are too many")
            return opened.convert("RGB")
    except UnidentifiedImageError as error:
        # Pillow's own text names an address in memory, another one each time.
        raise ValueError(f"its {len(value)} bytes are no image of a known kind") from error
