"""Scores of a data set: the same rows with a column a metric, as Parquet, with a manifest inside and beside."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from prunekit.core.errors import EvaluationError, UsageError
from prunekit.core.files import write_json
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.core.ranks import joined
from prunekit.core.registry import METRICS
from prunekit.datasets.encoder import encoder
from prunekit.datasets.examples import Examples, Settings
from prunekit.datasets.source import Reading, Source, open_source
from prunekit.datasets.writers import gathered

COLUMN = "score_"
# Key of the manifest in the Parquet file's own metadata.
METADATA = b"prunekit"
_PACKAGES = ("prunekit", "torch", "transformers", "numpy", "pyarrow", "scikit-learn", "faiss-cpu", "datasets")


@dataclass(frozen=True)
class Request:
    """What is scored, and how.

    Args:
        data: path of the data set.
        metrics: knobs of each metric by its registry name.
        model: source of the model; None takes MiniLM for text where a metric needs one.
        max_tokens: longer texts are cut before a model reads them.
        reading: columns and pieces.
        settings: seed, device, memory, cache.
    """

    data: Path
    metrics: Mapping[str, Mapping[str, Any]]
    model: str | None = None
    max_tokens: int = 256
    reading: Reading = field(default_factory=Reading)
    settings: Settings = field(default_factory=Settings)


def write_scores(request: Request, output: Path, progress: Progress = NULL_PROGRESS) -> dict[str, Any]:
    """Scores a data set, writes `output` and the manifest beside it, and returns the manifest.

    Under torchrun all ranks work and the first one writes.

    Raises:
        UsageError: if the data, a metric or a knob is not what it must be.
        EvaluationError: if a score or an embedding is not finite.
    """
    metrics = {name: made(name, knobs) for name, knobs in request.metrics.items()}
    with joined() as ranks:
        data = open_source(request.data, request.reading, progress)
        taken = [name for name in metrics if COLUMN + name in data.opened.schema.names]
        if taken:
            raise UsageError(f"`{request.data}` already has a column `{COLUMN}{taken[0]}`", hint="score the original")
        needed = any(set(metric.needs) - {"text"} for metric in metrics.values())
        model = None
        if needed or request.model is not None:
            model = encoder(request.model, data, request.settings.device, request.max_tokens, progress)
        examples = Examples(data, model, request.settings, ranks, progress)
        for name, metric in metrics.items():
            if "labels" in metric.needs:
                examples.asking = f"`{name}`"
                examples.require_labels()
        scores = {}
        for name, metric in metrics.items():
            examples.asking = f"`{name}`"
            scores[name] = checked(name, metric.score(examples), examples.n)
        manifest = _manifest(request, examples, metrics, scores)
        if ranks.first:
            _write(output, data, scores, manifest)
        ranks.wait()
    return manifest


def made(name: str, knobs: Mapping[str, Any]) -> Any:
    """A metric with its knobs.

    Raises:
        UsageError: if there is no such metric, or a knob is unknown or out of range.
    """
    from prunekit.core.recipe_fields import knob_problems

    cls = METRICS.get(name)
    problems = knob_problems(cls, knobs, ())
    if problems:
        first = problems[0]
        raise UsageError(f"{first.what}", why=first.why or f"knob of `{name}`", hint=first.hint)
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in knobs.items()})


def checked(name: str, values: np.ndarray, n: int) -> np.ndarray:
    """Scores as float32 [n].

    Raises:
        EvaluationError: if one is not finite.
    """
    found = np.asarray(values, np.float32)
    bad = np.flatnonzero(~np.isfinite(found))
    if len(bad) or found.shape != (n,):
        raise EvaluationError(f"`{name}` gives no finite score to {len(bad)} of {n} examples", why=f"first: {bad[:1]}")
    return found


def manifest_file(scores: Path) -> Path:
    """Where the manifest of a score file lies: `x.parquet` has `x.json`."""
    return scores.with_suffix(".json")


def _manifest(
    request: Request, data: Examples, metrics: Mapping[str, Any], scores: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    from dataclasses import asdict

    source, settings = data.source, request.settings
    return {
        "schema": 1,
        "data": {
            "path": str(source.opened.path.absolute()),
            "format": source.opened.format,
            "digest": source.digest,
            "examples": source.n,
            "kind": source.kind,
            "column": source.column,
            "label_column": source.label_column,
            "columns": source.opened.schema.names,
            "classes": data.counts(),
            "skipped": [str(bad) for bad in source.bad],
        },
        "model": _model_facts(data),
        "metrics": {name: _knobs(metric) for name, metric in metrics.items()},
        "trained_params": data.trained_params(),
        "ranges": {name: [float(found.min()), float(found.max())] for name, found in scores.items()},
        "tokens": int(scores["length"].astype(np.float64).sum()) if "length" in scores and data.encoder else None,
        "settings": {**{k: v for k, v in asdict(settings).items() if k != "cache"}, "max_tokens": request.max_tokens},
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _knobs(metric: Any) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in type(metric).__pydantic_fields__}


def _model_facts(data: Examples) -> dict[str, Any] | None:
    from prunekit.checkpoint.reader import Checkpoint

    if data.encoder is None:
        return None
    tensors = Checkpoint.open(data.encoder.folder).tensors.values()
    params = sum(math.prod(info.shape) for info in tensors)
    return {"source": data.encoder.source, "digest": data.encoder.digest, "params": params}


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _write(output: Path, data: Source, scores: Mapping[str, np.ndarray], manifest: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    schema = data.opened.schema
    for name in scores:
        schema = schema.append(pa.field(COLUMN + name, pa.float32()))
    text = json.dumps(manifest, ensure_ascii=False)
    schema = schema.with_metadata({**(schema.metadata or {}), METADATA: text.encode()})
    part = output.with_name(f".{output.name}.part")
    try:
        with parquet.ParquetWriter(part, schema) as writer:
            first = 0
            for table in gathered(pa.Table.from_batches([batch]) for batch in data.batches()):
                last = first + table.num_rows
                for name, found in scores.items():
                    table = table.append_column(COLUMN + name, pa.array(found[first:last]))
                writer.write_table(table.cast(schema))
                first = last
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)
    write_json(manifest_file(output), manifest)
