"""Prompts from a text file (one a line) or from a column of a data set.

Prompts stay on the disk and are read by their index, so that millions of them need no memory.
"""

from __future__ import annotations

import re
import warnings
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain, count
from mmap import ACCESS_READ, mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, overload

from pilotfish.data.tables import TABLES, column_choices, find_column, texts_of
from pilotfish.data.text_files import (
    SKIP_HINT,
    checked_text,
    describe,
    open_utf8,
    read_lines,
    strip,
)
from pilotfish.errors import in_brief

FINGERPRINT_ENDS = 4096
_TEXTS = (".txt", *TABLES)
_FORMATS = {
    ".parquet": "parquet", ".tar": "webdataset", ".arrow": "arrow",
    ".csv": "csv", ".json": "json", ".jsonl": "json",
}  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.txt)", re.IGNORECASE)


def load_prompts(source: str | Path) -> list[str]:
    """All prompts of a source, see :func:`open_prompts`."""
    return open_prompts(source)[:]


def open_prompts(
    source: str | Path, column: str | None = None, split: str = "train",
    skip_missing: bool = False,
) -> TextSequence:  # fmt: skip
    """Prompts by index, read from the disk on access.

    Args:
        source: a text file, one prompt a line; a pipe, or "-" for standard input, of such lines; a
            Parquet, CSV or JSON lines file, webdataset shards (``.tar``), several of those by a
            pattern such as ``shards/*.tar``, or a folder of them; or the id of a data set on the
            hub.
        column: the column of a data set. Default: the first of ``CAPTION_COLUMNS`` that exists.
        split: the split of a data set that has several.
        skip_missing: skip the rows of a data set that have no text, and count them in a warning.

    Raises:
        ValueError: the source does not exist, is in an unknown encoding, holds no prompt or has no
            such column, a row has no text, or the package that reads it is not installed.
    """
    path, name, suffix = Path(source), describe(source), Path(source).suffix.lower()
    is_pattern = not path.exists() and any(c in path.name for c in "*?[")
    is_hub_id = not path.exists() and _HUB_ID.fullmatch(str(source))
    is_url = re.match(r"\w{2,}://", str(source))
    texts: TextSequence
    if is_pattern and suffix in _TEXTS and not is_url:
        files = sorted(path.parent.glob(path.name))
        if not files:
            raise ValueError(f"no prompts could be read from {name}: no such files")
        texts, skipped = _read_files(files, column, skip_missing)
    elif suffix in TABLES and not path.is_dir() and not is_url:
        texts, skipped = _read_files([path], column, skip_missing)
    elif path.is_dir() or is_pattern or suffix in _FORMATS or is_hub_id or is_url:
        if path.is_fifo():
            raise ValueError(f"{name} is a pipe; a data set of this format needs a file")
        texts, skipped = _read_column(str(source), column, split, skip_missing)
    else:
        texts, skipped = _read_lines(source), 0
    if skipped:
        rows = len(texts) + skipped
        warnings.warn(f"{name}: {skipped} of {rows} rows without a text are skipped", stacklevel=2)
    if not texts:
        raise ValueError(f"{name} holds no prompt")
    return texts


def fingerprint(texts: Sequence[str]) -> str:
    """The number of texts and the start of their SHA-256, as words. Of more than
    ``2 * FINGERPRINT_ENDS`` only the first and the last are read, which takes no memory."""
    digest, count = sha256(), len(texts)
    ends = (range(min(count, FINGERPRINT_ENDS)), range(max(count - FINGERPRINT_ENDS, 0), count))
    for index in dict.fromkeys(chain(*ends)):
        digest.update(texts[index].encode() + b"\0")  # no text holds a NUL
    return f"{count} texts with the SHA-256 {digest.hexdigest()[:16]}"


class TextSequence(Sequence[str]):
    """Texts by index; a slice is a list."""

    @abstractmethod
    def read(self, index: int) -> str:
        """The text at an index in [0, N)."""

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        selected = range(len(self))[index]
        if isinstance(selected, int):
            return self.read(selected)
        return [self.read(i) for i in selected]


class MappedTexts(TextSequence):
    """Parts of a memory-mapped UTF-8 file. Only their offsets are in memory.

    Args:
        file: a file with a descriptor; it may be closed afterwards.
        spans: the first and the last offset (exclusive) of each text.
    """

    def __init__(self, file: IO[bytes], spans: Iterable[tuple[int, int]]) -> None:
        self.offsets = array("Q", chain.from_iterable(spans))
        file.flush()
        self.file = mmap(file.fileno(), 0, access=ACCESS_READ) if self.offsets else b""

    def __len__(self) -> int:
        return len(self.offsets) // 2

    def read(self, index: int) -> str:
        start, end = self.offsets[2 * index : 2 * index + 2]
        return strip(self.file[start:end].decode())


class ColumnTexts(TextSequence):
    """The column ``text`` of a ``datasets.Dataset``, a memory-mapped Arrow file."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, index: int) -> str:
        text: str = self.rows[index]["text"]
        return text


class ConcatTexts(TextSequence):
    """Several sequences of texts, one after another."""

    def __init__(self, *parts: Sequence[str]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, index: int) -> str:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def _read_lines(path: str | Path) -> MappedTexts:
    """The lines of a text file, stripped and without blank ones."""
    name = describe(path)

    def spans(file: IO[bytes]) -> Iterator[tuple[int, int]]:
        end = 0
        for number, line in enumerate(read_lines(file, name), 1):
            start, end = end, end + len(line.encode())
            if strip(line):
                try:
                    checked_text(line)
                except ValueError as error:
                    raise ValueError(f"{name}, line {number}: {error}") from None
                yield start, end

    with open_utf8(path) as file:
        return MappedTexts(file, spans(file))


def _read_files(
    files: Sequence[Path], column: str | None, skip_missing: bool
) -> tuple[MappedTexts, int]:
    """Lines of text or a column of tables, and how many rows were skipped."""
    skipped = 0

    def spans(copy: IO[bytes]) -> Iterator[tuple[int, int]]:
        nonlocal skipped
        end = 0
        for file in files:
            for place, value in texts_of(file, column):
                try:
                    text = checked_text(value)
                except ValueError as error:
                    if not skip_missing:
                        raise ValueError(f"{file}, {place}: {error}; {SKIP_HINT}") from None
                    skipped += 1
                    continue
                start, end = end, end + copy.write(text.encode())
                yield start, end

    with TemporaryFile() as copy:
        return MappedTexts(copy, spans(copy)), skipped


def _read_column(
    source: str, column: str | None, split: str, skip_missing: bool
) -> tuple[TextSequence, int]:
    """A column of a data set that the ``datasets`` library finds, and how many rows were skipped.

    Local text files, CSV and JSON lines are read by :func:`_read_files`. The texts of all else are
    written once into an Arrow file in the cache of that library, which is then memory-mapped.
    Other columns, such as images, are not copied.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source} is read by the datasets library: pip install 'pilotfish[datasets]'"
        ) from error
    try:
        builder = _builder(source)
        found = builder.config.data_files or {}
        files = [Path(file) for file in found.get(split, ())]
        if files and all(file.suffix.lower() in _TEXTS and file.is_file() for file in files):
            return _read_files(files, column, skip_missing)
        stream = builder.as_streaming_dataset(split=split)
        features = stream.features or stream._resolve_features().features
    except Exception as error:  # a damaged file can raise anything
        raise _unreadable(source, error) from error
    columns = {name: _may_be_text(feature) for name, feature in features.items()}
    column = find_column(source, column, columns)
    if not columns[column]:
        kind = getattr(features[column], "dtype", "") or type(features[column]).__name__
        raise ValueError(
            f"column {column} of {source} holds {kind}, no texts; {column_choices(columns)}"
        )
    # part of the cache key: a file that has changed is read again
    origin = {name: (list(some), some.origin_metadata) for name, some in found.items()}
    arguments: dict[str, Any] = {
        "source": source, "column": column, "split": split, "skip_missing": skip_missing,
        "origin": repr(origin),
    }  # fmt: skip
    try:
        if next(_column_rows(**arguments), None) is None:
            raise ValueError("it has no rows")
        rows = datasets.Dataset.from_generator(
            _column_rows, gen_kwargs=arguments,
            features=datasets.Features({"text": datasets.Value("string")}),
        )  # fmt: skip
    except Exception as error:
        raise _unreadable(source, error) from error
    skipped: int = rows.data.column("text").null_count
    if skipped:
        rows = rows.select(rows.data.column("text").is_valid().to_numpy().nonzero()[0])
    return ColumnTexts(rows), skipped


def _builder(source: str) -> Any:
    from datasets import load_dataset_builder

    kind = _FORMATS.get(Path(source).suffix.lower())
    return load_dataset_builder(kind, data_files=source) if kind else load_dataset_builder(source)


def _column_rows(
    source: str, column: str, split: str, skip_missing: bool, origin: str
) -> Iterator[dict[str, str | None]]:
    stream = _builder(source).as_streaming_dataset(split=split)
    # row group by row group: reading a whole Parquet file at once would prefetch too much
    rows = iter(stream.reshard().select_columns([column]))
    for number in count(1):
        try:
            row = next(rows, None)
        except Exception as error:
            raise ValueError(f"row {number}: {in_brief(error)}") from error
        if row is None:
            return
        try:
            text = checked_text(row.get(column))
        except ValueError as error:
            if not skip_missing:
                raise ValueError(f"row {number}: {error}; {SKIP_HINT}") from None
            text = None
        yield {"text": text}


def _unreadable(source: str, error: BaseException) -> ValueError:
    while type(error).__module__.startswith("datasets") and error.__cause__:
        error = error.__cause__  # the library's own message names no reason
    return ValueError(f"no prompts could be read from {source}: {in_brief(error)}")


def _may_be_text(feature: Any) -> bool:
    """Whether a column's type allows texts; null is empty so far, Json is of any type."""
    texts = ("string", "large_string", "string_view", "null")
    return getattr(feature, "dtype", None) in texts or type(feature).__name__ == "Json"
