"""From a score file to the examples that stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prunekit.core.errors import UsageError
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.datasets.examples import Examples, Settings
from prunekit.datasets.readers import require_pyarrow
from prunekit.datasets.rules import Facts, Rule, choose, decide, n_kept, ranking
from prunekit.datasets.score import COLUMN, METADATA, manifest_file
from prunekit.datasets.source import Reading, Source, class_counts, open_source

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class ScoreFile:
    """A score file that was opened and checked.

    Args:
        path: the Parquet file.
        manifest: what it was made from.
        metric: the metric whose scores count.
    """

    path: Path
    manifest: dict[str, Any]
    metric: str

    @cached_property
    def scores(self) -> np.ndarray:
        """Scores, float32 [n]."""
        return self.column(COLUMN + self.metric)

    @cached_property
    def source(self) -> Source:
        """The rows as a data set, without the scores' meaning."""
        data = self.manifest["data"]
        named = {data["kind"]: data["column"]}
        return open_source(self.path, Reading(label=data["label_column"], **named), look=False)

    def column(self, name: str) -> np.ndarray:
        """A column of numbers as an array [n]."""
        import pyarrow.parquet as parquet

        found: np.ndarray = parquet.read_table(self.path, columns=[name]).column(0).to_numpy()
        return found


def open_scores(path: Path, metric: str | None = None, data: Path | None = None) -> ScoreFile:
    """Opens a score file.

    Args:
        path: what `prunekit data score` wrote.
        metric: whose scores; None where the file has one.
        data: data set that the scores must be of; None does not compare.
    Raises:
        UsageError: if it is no score file, lacks the metric, or belongs to another data set.
    """
    require_pyarrow()
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if not path.is_file():
        raise UsageError(f"no score file `{path}`", hint="prunekit data score DATASET --metric NAME writes one")
    try:
        schema = parquet.read_schema(path)
        manifest = json.loads((schema.metadata or {})[METADATA])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        hint = "prunekit data score DATASET --metric NAME writes one"
        raise UsageError(f"`{path}` is no score file", why="it holds no manifest of prunekit", hint=hint) from error
    _require_same(path, manifest, data)
    names = list(manifest["metrics"])
    if metric is None and len(names) > 1:
        raise UsageError(f"`{path}` holds several scores", hint=f"--metric, one of: {', '.join(names)}")
    if metric is not None and metric not in names:
        raise UsageError(f"`{path}` has no scores of `{metric}`", hint=f"it has: {', '.join(names)}")
    return ScoreFile(path, manifest, metric or names[0])


def _require_same(path: Path, manifest: dict[str, Any], data: Path | None) -> None:
    """Fails where the manifest beside the file, or the data set that is given, is about other data."""
    own = manifest["data"]["digest"]
    beside = manifest_file(path)
    if beside.is_file():
        try:
            other = json.loads(beside.read_text("utf-8"))["data"]["digest"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"`{beside}` is no manifest of scores", hint="delete it; the score file holds a copy"
            ) from error
        if other != own:
            why = f"its digest is {own[:12]}, that of the manifest beside it {other[:12]}"
            raise UsageError(f"`{path}` is of another data set than `{beside.name}`", why=why)
    if data is not None:
        facts = manifest["data"]
        named = {facts["kind"]: facts["column"]}
        reading = Reading(label=facts["label_column"], skip_bad=bool(facts["skipped"]), **named)
        try:
            found = open_source(data, reading).digest
        except UsageError as error:
            if not data.exists():
                raise
            what = f"`{path}` is not known to be of `{data}`"
            raise UsageError(
                what, why=f"{error.what}{error.why and f': {error.why}'}", hint="score this one"
            ) from error
        if found != own:
            why = f"its digest is {found[:12]}, the scores are of {own[:12]}"
            raise UsageError(f"`{path}` is of another data set than `{data}`", why=why, hint="score this one")


@dataclass(frozen=True)
class Selection:
    """What stays and why.

    Args:
        indices: positions that stay, ascending.
        rule: `hard` or `easy`.
        why: reason of the rule.
        duplicates: examples that went as near duplicates.
        before: examples of each class.
        after: kept examples of each class.
        tokens: tokens of the kept examples; None where nobody counted.
    """

    indices: np.ndarray
    rule: str
    why: str
    duplicates: int
    before: dict[str, int]
    after: dict[str, int]
    tokens: int | None

    def to_json(self) -> dict[str, Any]:
        """Plain values; `kept` instead of the positions."""
        data = {key: value for key, value in vars(self).items() if key != "indices"}
        return {"kept": len(self.indices), **data}


def select(
    file: ScoreFile,
    rule: Rule,
    near_duplicates: float | None = None,
    settings: Settings | None = None,
    progress: Progress = NULL_PROGRESS,
) -> Selection:
    """Applies a rule to a score file.

    Args:
        near_duplicates: cosine above which of two examples only the better one stays; None keeps both.
        settings: device and cache, for embeddings that must be made again.
    """
    n, data = len(file.scores), file.manifest["data"]
    codes = file.source.codes if data["label_column"] is not None else None
    labels = None if codes is None or (codes < 0).all() else codes
    tokens = file.column(COLUMN + "length") if "length" in file.manifest["metrics"] else None
    total = file.manifest["tokens"]
    share = rule.tokens / max(1, total or 1) if rule.tokens is not None else n_kept(rule, n) / n
    share = min(1.0, share)
    params = (file.manifest["model"] or {}).get("params")
    facts = Facts(file.manifest.get("trained_params"), file.manifest["settings"]["trains"], total, params)
    which, why = decide(rule.rule, round(share * n), share, facts)
    order = ranking(file.scores, which == "hard", rule.seed)
    if near_duplicates is not None:
        if not 0 < near_duplicates < 1:
            raise UsageError(f"`near_duplicates: {near_duplicates:g}` is out of range", why="a cosine between 0 and 1")
        order = _without_duplicates(file, order, near_duplicates, settings or Settings(), progress)
    found = choose(order, rule, n, labels, tokens)
    names = file.source.classes
    return Selection(
        found,
        which,
        why,
        n - len(order),
        class_counts(labels, names) if labels is not None else {},
        class_counts(labels[found], names) if labels is not None else {},
        int(tokens[found].sum()) if tokens is not None and total is not None else None,
    )


def _without_duplicates(
    file: ScoreFile, order: np.ndarray, cosine: float, settings: Settings, progress: Progress
) -> np.ndarray:
    from prunekit.datasets.duplicates import without_near_duplicates
    from prunekit.datasets.encoder import encoder

    name = (file.manifest["model"] or {}).get("source")
    tokens = file.manifest["settings"]["max_tokens"]
    # The digest of the data that was scored, so that its embeddings are found where they are still in the cache.
    file.source.digest = file.manifest["data"]["digest"]
    model = encoder(name, file.source, settings.device, tokens, progress)
    examples = Examples(file.source, model, settings, progress=progress)
    return without_near_duplicates(examples.embeddings_file, order, cosine, settings.seed)


def kept_rows(file: ScoreFile, selection: Selection) -> Iterator[pa.Table]:
    """Kept rows with the columns of the data set that was scored."""
    import pyarrow as pa

    columns = file.manifest["data"]["columns"]
    first = 0
    for batch in file.source.batches():
        low, high = np.searchsorted(selection.indices, (first, first + batch.num_rows))
        if high > low:
            table = pa.Table.from_batches([batch]).select(columns)
            yield table.take(pa.array(selection.indices[low:high] - first))
        first += batch.num_rows


def write_selected(file: ScoreFile, selection: Selection, rule: Rule, output: Path) -> dict[str, Any]:
    """Writes the kept rows in the format that `output` names, with a manifest beside, which it returns."""
    from prunekit.core.files import write_json
    from prunekit.datasets.writers import write_rows

    write_rows(kept_rows(file, selection), file.source.opened.schema, file.manifest["data"], output)
    manifest = {
        "schema": 1,
        "scores": {"path": str(file.path.absolute()), "metric": file.metric, "data": file.manifest["data"]["digest"]},
        "asked": asdict(rule),
        **selection.to_json(),
        "indices": selection.indices.tolist(),
    }
    write_json(output.with_name(output.name + ".json"), manifest)
    return manifest
