"""A data set as prunekit reads it: Arrow record batches in one fixed order, counted and checked once."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prunekit.core.errors import UsageError
from prunekit.core.files import sha256_file
from prunekit.core.progress import NULL_PROGRESS, Progress
from prunekit.datasets.images import decode

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL.Image import Image

# Columns that are taken for what their names say where nobody names one.
_TEXT = ("text", "sentence", "content")
_LABEL = ("label", "labels")
_IMAGE = ("image", "img")
_LISTED = 10


@dataclass(frozen=True)
class Reading:
    """How a data set is read.

    Args:
        text: column that holds the text; None takes `text`, `sentence` or `content`.
        label: column that holds the class; None takes `label` or `labels`.
        image: column that holds the image; None takes `image` or `img`.
        pieces: what an example of a plain text file is.
        window_words: words of a window.
        skip_bad: leave images out that cannot be read, instead of failing.
    """

    text: str | None = None
    label: str | None = None
    image: str | None = None
    pieces: Literal["paragraphs", "lines", "windows"] = "paragraphs"
    window_words: int = 200
    skip_bad: bool = False


@dataclass(frozen=True)
class Opened:
    """A data set's files and how to stream them; what a reader hands over.

    Args:
        path: as the user gave it.
        format: `hf`, `parquet`, `shards` (a folder of Parquet files), `jsonl`, `csv`, `images`, `zip` or `text`.
        files: every file that the content depends on.
        read: a new pass over the rows, in the same order each time.
        schema: of the batches.
        class_names: names of integer labels, where the data set says them.
    """

    path: Path
    format: str
    files: tuple[Path, ...]
    read: Callable[[], Iterator[pa.RecordBatch]]
    schema: pa.Schema
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bad:
    """An image that cannot be read."""

    index: int
    name: str
    why: str

    def __str__(self) -> str:
        return f"{self.name or f'row {self.index}'}: {self.why}"


@dataclass
class Source:
    """A data set that was scanned: its size, labels and unreadable images are known. Holds 4 bytes an example.

    Args:
        opened: files and reader.
        kind: what its examples are.
        column: name of the text or image column.
        label_column: name of the label column, None where there is none.
        n: readable examples.
        codes: class numbers, int32 [n], -1 where the label is missing; None without a label column.
        classes: class names, sorted by label.
        bad: unreadable images; no batch holds them.
        digest: SHA-256 over the files' names and content, and over how they are read.
    """

    opened: Opened
    kind: Literal["text", "image"]
    column: str
    label_column: str | None
    digest: str
    n: int = 0
    codes: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    bad: tuple[Bad, ...] = ()
    _skip: frozenset[int] = field(default=frozenset(), repr=False)

    @property
    def name(self) -> str:
        """Short name for titles and file names."""
        return self.opened.path.name.split(".")[0] or "data"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Readable rows with all columns, in order."""
        import pyarrow as pa

        first = 0
        for batch in self.opened.read():
            last = first + batch.num_rows
            if any(first <= index < last for index in self._skip):
                keep = [index not in self._skip for index in range(first, last)]
                batch = batch.filter(pa.array(keep))
            first = last
            if batch.num_rows:
                yield batch

    def blocks(self, size: int, mine: Callable[[int], bool] = lambda number: True) -> Iterator[tuple[int, list[Any]]]:
        """Texts, or undecoded images, in blocks of exactly `size` (the last may be shorter).

        Args:
            mine: whether block `number` is wanted; others are read past without being converted.
        Yields:
            Position of the block's first example, and its values.
        """
        import pyarrow as pa

        held: list[pa.Array] = []
        first = number = 0

        def cut(rows: int) -> list[Any]:
            nonlocal held
            joined = pa.concat_arrays(held)
            held = [joined.slice(rows)]
            return joined.slice(0, rows).to_pylist() if mine(number) else []

        for batch in self.batches():
            held.append(batch.column(batch.schema.get_field_index(self.column)))
            while sum(map(len, held)) >= size:
                values = cut(size)
                if values:
                    yield first, values
                first, number = first + size, number + 1
        rest = sum(map(len, held))
        if rest and (values := cut(rest)):
            yield first, values

    def decoded(self, values: Sequence[Any]) -> list[Image]:
        """Images of a block as RGB."""
        return [decode(value, self.opened.path.parent) for value in values]


def open_source(
    path: str | Path, reading: Reading | None = None, progress: Progress = NULL_PROGRESS, look: bool = True
) -> Source:
    """Opens a data set and scans it once: size, labels, unreadable images, digest.

    Args:
        path: folder of `save_to_disk`, Parquet file or folder of Parquet shards, .jsonl, .csv, image folder or zip of
            one (the folder that holds an image is its class), or a .txt file.
        reading: columns and pieces.
        progress: shown as examples.
        look: decode every image to find the unreadable ones; False where that was done before.
    Raises:
        UsageError: if it is none of these, lacks its column, is empty, or has images that cannot be read.
    """
    from prunekit.datasets.readers import open_files

    reading = reading or Reading()
    opened = open_files(Path(path).expanduser(), reading)
    names = opened.schema.names
    image = _column(reading.image, _IMAGE, names, "image", path)
    text = _column(reading.text, _TEXT, names, "text", path) if image is None or reading.text else None
    column = text or image
    if column is None:
        why = f"its columns are {', '.join(names)}"
        raise UsageError(f"`{path}` has no text and no image column", why=why, hint="name one: --text-column NAME")
    kind: Literal["text", "image"] = "text" if text else "image"
    label = _column(reading.label, _LABEL, names, "label", path)
    source = Source(opened, kind, column, label, digest=_digest(opened, column, label, reading))
    _scan(source, reading.skip_bad, progress, look)
    return source


def _column(named: str | None, usual: Sequence[str], names: Sequence[str], role: str, path: Any) -> str | None:
    if named is None:
        return next((name for name in usual if name in names), None)
    if named not in names:
        why = f"its columns are {', '.join(names)}"
        raise UsageError(f"`{path}` has no {role} column `{named}`", why=why)
    return named


def _digest(opened: Opened, column: str, label: str | None, reading: Reading) -> str:
    digest = hashlib.sha256(f"{opened.format}/{column}/{label}/{reading.skip_bad}".encode())
    if opened.format == "text":
        digest.update(f"/{reading.pieces}/{reading.window_words}".encode())
    root = opened.path if opened.path.is_dir() else opened.path.parent
    for file in sorted(opened.files):
        digest.update(f"\0{file.relative_to(root).as_posix()}\0{sha256_file(file)}".encode())
    return digest.hexdigest()


def _scan(source: Source, skip_bad: bool, progress: Progress, look: bool) -> None:
    """Fills in what a pass over the rows tells."""
    codes: list[np.ndarray] = []
    known: dict[Any, int] = {}
    _require_classes(source)
    bad: list[Bad] = []
    first = empty = 0
    with progress.task("reading", unit="examples") as task:
        for batch in source.opened.read():
            values = batch.column(batch.schema.get_field_index(source.column))
            if source.kind == "image" and look:
                bad += _unreadable(values.to_pylist(), first, source.opened.path.parent)
            elif source.kind == "text":
                empty += values.null_count
                _require_text(values, source)
            if source.label_column is not None:
                labels = batch.column(batch.schema.get_field_index(source.label_column)).to_pylist()
                numbers = [-1 if _missing(value) else known.setdefault(value, len(known)) for value in labels]
                codes.append(np.array(numbers, np.int32))
            first += batch.num_rows
            task.advance(batch.num_rows)
    if empty:
        raise UsageError(f"{empty} of {first} examples of `{source.opened.path}` have no text", why="the cell is null")
    if bad and not skip_bad:
        more = f"\nand {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
        raise UsageError(
            f"{len(bad)} of {first} images of `{source.opened.path}` cannot be read",
            why="\n".join(map(str, bad[:_LISTED])) + more,
            hint="--skip-bad leaves them out",
        )
    source.bad, source._skip = tuple(bad), frozenset(entry.index for entry in bad)
    source.n = first - len(bad)
    if not source.n:
        raise UsageError(f"`{source.opened.path}` holds no examples")
    if codes:
        source.codes, source.classes = _sorted_classes(np.concatenate(codes), known, source.opened.class_names)
        source.codes = np.delete(source.codes, sorted(source._skip))


def _missing(value: Any) -> bool:
    return value is None or value == "" or value != value


def _require_classes(source: Source) -> None:
    import pyarrow as pa

    if source.label_column is None:
        return
    kind = source.opened.schema.field(source.label_column).type
    if pa.types.is_nested(kind):
        why = f"column `{source.label_column}` is of type {kind}, and an example has one class here"
        raise UsageError(f"`{source.opened.path}` holds no classes", why=why, hint="name another: --label-column NAME")


def _require_text(values: pa.Array, source: Source) -> None:
    import pyarrow as pa

    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type) or pa.types.is_null(values.type)):
        why = f"column `{source.column}` is of type {values.type}"
        raise UsageError(f"`{source.opened.path}` holds no text", why=why, hint="name the text: --text-column NAME")


def _unreadable(values: Sequence[Any], first: int, folder: Path) -> Iterator[Bad]:
    for place, value in enumerate(values):
        try:
            decode(value, folder)
        except (OSError, ValueError, SyntaxError, TypeError, KeyError) as error:
            name = value.get("path") or "" if isinstance(value, dict) else value if isinstance(value, str) else ""
            yield Bad(first + place, name, " ".join(str(error).split())[:120] or type(error).__name__)


def _sorted_classes(
    codes: np.ndarray, known: dict[Any, int], names: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Codes in the order of the sorted labels, so that they do not depend on which example comes first."""
    values = sorted(known, key=lambda value: (str(type(value)), value))
    place = np.full(len(known) + 1, -1, np.int32)
    for new, value in enumerate(values):
        place[known[value]] = new
    texts = [names[v] if isinstance(v, int) and 0 <= v < len(names) else str(v) for v in values]
    return place[codes], tuple(texts)


def class_counts(codes: np.ndarray, classes: Sequence[str]) -> dict[str, int]:
    """Examples of each class by name."""
    counted = Counter(codes.tolist())
    return {name: counted.get(code, 0) for code, name in enumerate(classes)}
