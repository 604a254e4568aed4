"""Files of a data set as streams of Arrow record batches, one function a format."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from prunekit.core.errors import UsageError
from prunekit.datasets.images import SUFFIXES
from prunekit.datasets.source import Opened, Reading

if TYPE_CHECKING:
    import pyarrow as pa

# Rows held at once: photographs of 100 KB make 6 MB.
_ROWS = 64
_TEXT_ROWS = 1024
# Bytes read ahead of a Parquet column. Otherwise Arrow reads the column of a whole row group at once, and a file may be
# a single one: of 140 MiB, 317 MiB were held instead of 34.
_PAGES = 1 << 20
# Bytes that a file inside a zip archive may claim.
_MOST_IMAGE_BYTES = 1 << 28
_FORMS = (
    "a data set is a folder of save_to_disk, Parquet, .jsonl, .csv, an image folder or a zip of one, or a .txt file"
)


def open_files(path: Path, reading: Reading) -> Opened:
    """Finds out what a path is.

    Raises:
        UsageError: if it is no data set, or pyarrow is not installed.
    """
    require_pyarrow()
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise UsageError(f"no data set `{path}`", why=_FORMS)
    openers: dict[str, Callable[[Path], Opened]] = {
        ".parquet": lambda file: _parquet(file, (file,), "parquet"),
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".zip": _zip,
        ".txt": lambda file: _text(file, reading),
    }
    if path.suffix not in openers:
        raise UsageError(f"`{path}` is no data set that can be read", why=_FORMS)
    try:
        return openers[path.suffix](path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error


def require_pyarrow() -> None:
    """Raises `UsageError` where pyarrow is not installed."""
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise UsageError("data pruning needs pyarrow", hint="pip install 'prunekit[data]'") from error


def _damaged(path: Path, error: BaseException) -> UsageError:
    return UsageError(f"`{path}` cannot be read", why=" ".join(str(error).split())[:300] or type(error).__name__)


def _folder(path: Path) -> Opened:
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return _saved(path)
    shards = tuple(sorted(path.glob("*.parquet")))
    if shards:
        return _parquet(path, shards, "shards")
    images = tuple(sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()))
    if not images:
        raise UsageError(f"`{path}` holds no data set", why=_FORMS)
    named = [(file.relative_to(path).as_posix(), file) for file in images]
    return _images(path, "images", images, lambda: ((name, file.read_bytes()) for name, file in named))


def _saved(path: Path) -> Opened:
    """A folder that `save_to_disk` of Hugging Face datasets wrote; of several splits, `train`."""
    try:
        from datasets import Dataset, load_from_disk
    except ImportError as error:
        raise UsageError(f"reading `{path}` needs the package datasets", hint="pip install datasets") from error
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if part.is_dir())
        if "train" not in splits and len(splits) != 1:
            hint = f"give one of: {', '.join(str(path / split) for split in splits)}"
            raise UsageError(f"`{path}` has several splits and none is named train", hint=hint)
        path = path / ("train" if "train" in splits else splits[0])
    try:
        found: Dataset = load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error

    def read() -> Iterator[pa.RecordBatch]:
        for table in found.with_format("arrow").iter(_ROWS):
            yield from table.to_batches()

    label = next((found.features[name] for name in ("label", "labels") if name in found.features), None)
    files = tuple(sorted(file for file in path.iterdir() if file.suffix == ".arrow"))
    return Opened(path, "hf", files, read, found.features.arrow_schema, tuple(getattr(label, "names", None) or ()))


def _parquet(path: Path, files: tuple[Path, ...], form: str) -> Opened:
    import pyarrow.parquet as parquet

    def read() -> Iterator[pa.RecordBatch]:
        for file in files:
            with _reading(file), parquet.ParquetFile(file, buffer_size=_PAGES, pre_buffer=False) as opened:
                yield from opened.iter_batches(batch_size=_ROWS)

    with _reading(path):
        schemas = [parquet.read_schema(file) for file in files]
    for file, schema in zip(files, schemas, strict=True):
        if not schema.equals(schemas[0]):
            raise UsageError(f"`{file.name}` has other columns than `{files[0].name}`", at=str(path))
    return Opened(path, form, files, read, schemas[0], _class_names(schemas[0]))


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    """Names of a ClassLabel that Hugging Face datasets wrote into the schema."""
    import json

    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, (features.get("label") or features["labels"])["names"]))
    except (KeyError, ValueError, TypeError):
        return ()


def _jsonl(path: Path) -> Opened:
    import pyarrow.json as json

    def read() -> Iterator[pa.RecordBatch]:
        with _reading(path), json.open_json(path) as reader:
            for batch in reader:
                yield from _sliced(batch)

    with _reading(path), json.open_json(path) as opened:
        schema = opened.schema
    return Opened(path, "jsonl", (path,), read, schema)


def _csv(path: Path) -> Opened:
    import pyarrow.csv as csv

    parse = csv.ParseOptions(newlines_in_values=True)

    def read() -> Iterator[pa.RecordBatch]:
        with _reading(path), csv.open_csv(path, parse_options=parse) as reader:
            for batch in reader:
                yield from _sliced(batch)

    with _reading(path), csv.open_csv(path, parse_options=parse) as opened:
        schema = opened.schema
    return Opened(path, "csv", (path,), read, schema)


def _sliced(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    for first in range(0, batch.num_rows, _TEXT_ROWS):
        yield batch.slice(first, _TEXT_ROWS)


class _reading:  # noqa: N801 (reads like the context manager that it is)
    """Turns what Arrow raises while a file is read into one error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import pyarrow as pa

        if isinstance(error, pa.ArrowException | OSError):
            raise _damaged(self.path, error) from error


def _text(path: Path, reading: Reading) -> Opened:
    import pyarrow as pa

    schema = pa.schema([("text", pa.string())])

    def read() -> Iterator[pa.RecordBatch]:
        held: list[str] = []
        for piece in _pieces(path, reading):
            held.append(piece)
            if len(held) == _TEXT_ROWS:
                yield pa.record_batch([held], schema=schema)
                held = []
        if held:
            yield pa.record_batch([held], schema=schema)

    return Opened(path, "text", (path,), read, schema)


def _pieces(path: Path, reading: Reading) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if reading.pieces == "lines":
                yield from (line.strip() for line in lines if line.strip())
            elif reading.pieces == "paragraphs":
                yield from _paragraphs(lines)
            else:
                yield from _windows(lines, reading.window_words)
    except UnicodeDecodeError as error:
        raise UsageError(f"`{path}` is not text", why=f"byte {error.start} is not UTF-8") from error


def _paragraphs(lines: Iterator[str]) -> Iterator[str]:
    held: list[str] = []
    for line in lines:
        if line.strip():
            held.append(line.rstrip("\n"))
        elif held:
            yield "\n".join(held)
            held = []
    if held:
        yield "\n".join(held)


def _windows(lines: Iterator[str], n_words: int) -> Iterator[str]:
    """Runs of words that do not overlap; the last may be shorter."""
    held: list[str] = []
    for line in lines:
        held += line.split()
        while len(held) >= n_words:
            yield " ".join(held[:n_words])
            held = held[n_words:]
    if held:
        yield " ".join(held)


def _zip(path: Path) -> Opened:
    with zipfile.ZipFile(path) as archive:
        members = sorted(m.filename for m in archive.infolist() if m.filename.lower().endswith(SUFFIXES))
    if not members:
        raise UsageError(f"`{path}` holds no images", why=f"endings that are known: {', '.join(SUFFIXES)}")

    def content() -> Iterator[tuple[str, bytes]]:
        with zipfile.ZipFile(path) as archive:
            for name in members:
                yield name, _member(archive, name)

    return _images(path, "zip", (path,), content)


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    """A file inside an archive; nothing where it is damaged, encrypted or too large, which no image decodes from."""
    if archive.getinfo(name).file_size > _MOST_IMAGE_BYTES:
        return b""
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError):
        return b""


def _images(
    path: Path, form: str, files: tuple[Path, ...], content: Callable[[], Iterator[tuple[str, bytes]]]
) -> Opened:
    """Images with their class: the folder that holds them, none for those at the top."""
    import pyarrow as pa

    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", cell), ("label", pa.string())])

    def batch(rows: list[tuple[str, bytes]]) -> pa.RecordBatch:
        cells = [{"bytes": data, "path": name} for name, data in rows]
        return pa.record_batch([pa.array(cells, cell), [_class(name) for name, _ in rows]], schema=schema)

    def read() -> Iterator[pa.RecordBatch]:
        held: list[tuple[str, bytes]] = []
        for row in content():
            held.append(row)
            if len(held) == _ROWS:
                yield batch(held)
                held = []
        if held:
            yield batch(held)

    return Opened(path, form, files, read, schema)


def _class(name: str) -> str | None:
    return PurePosixPath(name).parent.name or None
