"""Finished measurements on disk, found again by the content of the model, the data and the options."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from prunekit.checkpoint.cache import cache_folder
from prunekit.checkpoint.digest import model_digest
from prunekit.core.errors import EvaluationError
from prunekit.core.files import write_json
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.evaluate.figures import Figure
from prunekit.evaluate.specs import Asked
from prunekit.evaluate.subject import Subject
from prunekit.evaluate.task import digest


@dataclass(frozen=True)
class Measured:
    """What one task found on one model.

    Args:
        asked: the task.
        figures: by name.
        seconds: that it took; of the first time where it was reused.
        reused: whether it was found on disk.
    """

    asked: Asked
    figures: Mapping[str, Figure]
    seconds: float
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values, per-example values included."""
        return {
            "task": self.asked.name,
            "label": self.asked.label,
            "options": self.asked.options(),
            "figures": {name: figure.to_json() for name, figure in self.figures.items()},
            "seconds": round(self.seconds, 2),
            "reused": self.reused,
        }


@dataclass(frozen=True)
class Results:
    """Measurements of one model on disk.

    Args:
        folder: of the model, named by its digest.
        environment: what else a figure depends on.
    """

    folder: Path
    environment: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, subject: Subject, cache: Path | None = None, progress: Progress = NULL_PROGRESS) -> Results:
        """Measurements of a model, under `$PRUNEKIT_CACHE` or `~/.cache/prunekit` where `cache` is None."""
        found = model_digest(subject.folder, progress)
        environment: dict[str, Any] = {
            "backend": subject.backend,
            "device": subject.device.partition(":")[0],
            "dtype": subject.dtype,
            "versions": {name: _version(name) for name in ("torch", "transformers", "onnxruntime")},
        }
        if subject.attention is not None:
            environment["attention"] = dict(subject.attention)
        return cls(cache_folder(cache) / "evaluate" / found[:32], environment)

    def read(self, asked: Asked, data_digest: str) -> Measured | None:
        """A finished measurement; None where there is none, or its file cannot be read."""
        try:
            data = json.loads(self._file(asked, data_digest).read_text("utf-8"))
            figures = {name: Figure.from_json(figure) for name, figure in data["figures"].items()}
            return Measured(asked, figures, float(data["seconds"]), reused=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, measured: Measured, data_digest: str) -> None:
        """Keeps a finished measurement; it appears whole or not at all.

        Raises:
            EvaluationError: if the cache cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._file(measured.asked, data_digest), measured.to_json())
        except OSError as error:
            raise EvaluationError(
                f"cannot write to the cache folder `{self.folder}`",
                why=error.strerror or str(error),
                hint="set PRUNEKIT_CACHE to a folder with room that you may write to",
            ) from error

    def _file(self, asked: Asked, data_digest: str) -> Path:
        key: dict[str, Any] = {
            "task": asked.name,
            "version": asked.task.version,
            "options": asked.options(),
            "data": data_digest,
            "environment": self.environment,
        }
        if asked.task.machine_bound:
            key["machine"] = machine()
        return self.folder / f"{asked.name}-{digest(key)[:32]}.json"


def machine() -> dict[str, Any]:
    """What a speed depends on: the machine, its processor and torch's threads, and the GPU where there is one."""
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"node": platform.node(), "cpu": platform.processor(), "threads": torch.get_num_threads(), "gpu": cuda}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
