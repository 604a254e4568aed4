"""One digest for a model: equal where every file that can change a number is equal."""

from __future__ import annotations

import hashlib
from pathlib import Path

from prunekit.core.files import sha256_files
from prunekit.core.progress import NULL_PROGRESS, Progress

_SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt", ".py", ".onnx", ".data")
# What prunekit writes about a model; no loader reads it.
_REPORTS = ("prunekit.json", "README.md", "recipe.yaml")


def model_digest(folder: Path, progress: Progress = NULL_PROGRESS) -> str:
    """SHA-256 over names and content of weights, configuration, tokenizer and code of a folder, hexadecimal."""
    names = sorted(
        file.name
        for file in folder.iterdir()
        if file.is_file() and file.suffix in _SUFFIXES and file.name not in _REPORTS
    )
    found = sha256_files(folder, names, "digesting the model", progress)
    return hashlib.sha256("".join(f"{name}\0{value}\0" for name, value in found.items()).encode()).hexdigest()
