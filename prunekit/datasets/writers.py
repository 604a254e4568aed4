"""Selected rows in the format that the data set came in."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import UsageError
from prunekit.core.files import atomic_folder

if TYPE_CHECKING:
    import pyarrow as pa

    Rows = Iterator[pa.Table]

ENDINGS = {
    "hf": "",
    "parquet": ".parquet",
    "shards": "",
    "jsonl": ".jsonl",
    "csv": ".csv",
    "images": "",
    "zip": ".zip",
    "text": ".txt",
}
FOLDERS = tuple(name for name, ending in ENDINGS.items() if not ending)
# Bytes in memory of the rows of a Parquet shard.
_SHARD = 1 << 29


def format_of(output: Path, data: Mapping[str, Any]) -> str:
    """Format that a file name asks for.

    Args:
        data: the `data` part of a score file's manifest.
    Raises:
        UsageError: if no format has this ending, or it cannot hold the data.
    """
    came = str(data["format"])
    if output.suffix == "":
        return came if ENDINGS[came] == "" else "hf"
    form = next((name for name, ending in ENDINGS.items() if ending and ending == output.suffix), None)
    known = ", ".join(sorted(filter(None, ENDINGS.values())))
    if form is None:
        raise UsageError(f"`{output}` names no format", hint=f"endings: {known}; none for a folder")
    images = data["kind"] == "image"
    if (images and form in ("jsonl", "csv", "text")) or (form == "zip" and not images):
        raise UsageError(f"`{output.suffix}` cannot hold this data", why=f"its examples are {data['kind']}s")
    return form


def write_rows(rows: Rows, schema: pa.Schema, data: Mapping[str, Any], output: Path) -> None:
    """Writes rows to `output`, which appears whole or not at all; memory holds one batch."""
    form = format_of(output, data)
    if form in FOLDERS:
        with atomic_folder(output) as folder:
            if form == "hf":
                _saved(rows, schema, data, folder)
            elif form == "shards":
                _shards(rows, schema, data, folder)
            else:
                for name, content in _files(rows, data["column"]):
                    target = folder / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(content)
        return
    writers: dict[str, Callable[[Path], None]] = {
        "parquet": lambda part: _parquet(rows, schema, data, part),
        "jsonl": lambda part: _jsonl(rows, part),
        "csv": lambda part: _csv(rows, part),
        "zip": lambda part: _zip(rows, data["column"], part),
        "text": lambda part: _text(rows, data["column"], part),
    }
    part = output.with_name(f".{output.name}.part")
    try:
        writers[form](part)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def gathered(tables: Iterator[pa.Table], rows: int = 1024) -> Rows:
    """Tables joined to at least `rows` rows or 64 MiB: as row groups, small ones cost memory and read slowly."""
    import pyarrow as pa

    held: list[pa.Table] = []
    for table in tables:
        held.append(table)
        if sum(part.num_rows for part in held) >= rows or sum(part.nbytes for part in held) >= 1 << 26:
            yield pa.concat_tables(held)
            held = []
    if held:
        yield pa.concat_tables(held)


def _own(schema: pa.Schema, data: Mapping[str, Any]) -> pa.Schema:
    """Schema of the data set's own columns, without the scores' manifest."""
    import pyarrow as pa

    metadata = {key: value for key, value in (schema.metadata or {}).items() if key != b"prunekit"}
    return pa.schema([schema.field(name) for name in data["columns"]], metadata or None)


def _parquet(rows: Rows, schema: pa.Schema, data: Mapping[str, Any], part: Path) -> None:
    import pyarrow.parquet as parquet

    own = _own(schema, data)
    with parquet.ParquetWriter(part, own) as writer:
        for table in gathered(rows):
            writer.write_table(table.cast(own))


def _shards(rows: Rows, schema: pa.Schema, data: Mapping[str, Any], folder: Path) -> None:
    """Files of about half a gibibyte in memory each."""
    import pyarrow.parquet as parquet

    rows = gathered(rows)
    own, first = _own(schema, data), next(rows, None)
    number = 0
    while first is not None:
        held, table = 0, first
        first = None
        with parquet.ParquetWriter(folder / f"{number:05}.parquet", own) as writer:
            while table is not None:
                writer.write_table(table.cast(own))
                held += table.nbytes
                table = next(rows, None)
                if held >= _SHARD:
                    first = table
                    break
        number += 1


def _saved(rows: Rows, schema: pa.Schema, data: Mapping[str, Any], folder: Path) -> None:
    try:
        from datasets import Dataset
        from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    except ImportError as error:
        raise UsageError("writing a folder needs the package datasets", hint="pip install datasets") from error
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        part = Path(aside) / "rows.parquet"
        _parquet(rows, schema, data, part)
        silent = are_progress_bars_disabled()
        disable_progress_bars()
        try:
            Dataset.from_parquet(str(part), cache_dir=aside).save_to_disk(str(folder))
        finally:
            if not silent:
                enable_progress_bars()


def _jsonl(rows: Rows, part: Path) -> None:
    with part.open("w", encoding="utf-8") as lines:
        for table in rows:
            for row in table.to_pylist():
                lines.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")


def _csv(rows: Rows, part: Path) -> None:
    import pyarrow.csv as csv

    first = next(rows)
    with csv.CSVWriter(part, first.schema) as writer:
        writer.write_table(first)
        for table in rows:
            writer.write_table(table)


def _text(rows: Rows, column: str, part: Path) -> None:
    with part.open("w", encoding="utf-8") as lines:
        for table in rows:
            lines.writelines(f"{text}\n\n" for text in table.column(column).to_pylist())


def _zip(rows: Rows, column: str, part: Path) -> None:
    with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
        for name, content in _files(rows, column):
            archive.writestr(name, content)


def _files(rows: Rows, column: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of each image; a name that would lead out of its folder is refused."""
    for table in rows:
        for cell in table.column(column).to_pylist():
            name = PurePosixPath(cell["path"])
            if name.is_absolute() or ".." in name.parts or "\\" in cell["path"]:
                raise UsageError(f"the image name `{cell['path']}` leads out of its folder")
            yield str(name), cell["bytes"]
