"""Prompts from a text file (one a line) or from a column of a data set.

Prompts stay on the disk and are read by their index, so that millions of them need no memory.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from array import array
from collections.abc import Iterator, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, overload

from pilotfish.errors import in_brief

CAPTION_COLUMNS = ("text", "caption", "prompt", "txt")
"""Names that a column of prompts usually has, in the order in which they are tried."""

_FORMATS = {
    ".parquet": "parquet", ".tar": "webdataset", ".csv": "csv", ".json": "json", ".jsonl": "json",
    ".arrow": "arrow",
}  # fmt: skip
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.txt)")


def load_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    Raises:
        ValueError: the file is missing, is not text, or holds no prompt.
    """
    return _open_lines(Path(path))[:]


def open_prompts(
    source: str | Path, column: str | None = None, split: str = "train"
) -> Sequence[str]:
    """Prompts by index, read from the disk on access.

    Args:
        source: a text file, one prompt a line; a Parquet, CSV or JSON lines file, webdataset
            shards (``.tar``), several of those by a pattern such as ``shards/*.tar``, or a folder
            of them; or the id of a data set on the hub.
        column: the column of a data set. Default: the first of ``CAPTION_COLUMNS`` that exists.
        split: the split of a data set.

    Raises:
        ValueError: the source does not exist, holds no prompt or has no such column, or the
            package that reads it is not installed.
    """
    path = Path(source)
    is_pattern = any(c in path.name for c in "*?[")
    if path.is_dir() or is_pattern or path.suffix in _FORMATS:
        return _open_column(str(source), column, split)
    if not path.exists() and _HUB_ID.fullmatch(str(source)):
        return _open_column(str(source), column, split)
    return _open_lines(path)


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


class TextLines(TextSequence):
    """The non-empty lines of a UTF-8 text file, stripped. Only their offsets are in memory.

    Raises:
        OSError, UnicodeDecodeError: the file cannot be read, or is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.starts, self.ends = array("Q"), array("Q")
        with path.open("rb") as file:
            end = 0
            for raw in file:
                for line in raw.decode("utf-8").splitlines(keepends=True):
                    start, end = end, end + len(line.encode("utf-8"))
                    if line.strip():
                        self.starts.append(start)
                        self.ends.append(end)
            self.file = mmap(file.fileno(), 0, access=ACCESS_READ) if self.starts else b""

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> str:
        return self.file[self.starts[index] : self.ends[index]].decode("utf-8").strip()


class TextColumn(TextSequence):
    """The column ``text`` of a memory-mapped Arrow table."""

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


def _open_lines(path: Path) -> TextLines:
    try:
        lines = TextLines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"no prompts could be read from {path}: {error}") from error
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines


def _open_column(source: str, column: str | None, split: str) -> TextColumn:
    """A column of a data set, stripped and without empty texts.

    The texts are written once into an Arrow file in the cache of the ``datasets`` library, which
    is then memory-mapped. Other columns, such as images, are not copied.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{source} is read by the datasets library: pip install 'pilotfish[datasets]'"
        ) from error
    try:
        builder = _builder(source)
        stream = builder.as_streaming_dataset(split=split)
        features = stream.features or stream._resolve_features().features
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"no prompts could be read from {source}: {in_brief(error)}") from error
    column = _find_column(source, column, features)
    files = builder.config.data_files or {}
    # part of the cache key: a file that has changed is read again
    origin = {name: (list(some), some.origin_metadata) for name, some in files.items()}
    arguments = {"source": source, "column": column, "split": split, "origin": repr(origin)}
    try:
        if next(_texts(**arguments), None) is None:
            raise ValueError(f"there is no prompt in its column {column}")
        rows = datasets.Dataset.from_generator(
            _texts, gen_kwargs=arguments,
            features=datasets.Features({"text": datasets.Value("string")}),
        )  # fmt: skip
    except Exception as error:
        raise ValueError(f"no prompts could be read from {source}: {in_brief(error)}") from error
    return TextColumn(rows)


def _builder(source: str) -> Any:
    from datasets import load_dataset_builder

    kind = _FORMATS.get(Path(source).suffix)
    return load_dataset_builder(kind, data_files=source) if kind else load_dataset_builder(source)


def _texts(source: str, column: str, split: str, origin: str) -> Iterator[dict[str, str]]:
    stream = _builder(source).as_streaming_dataset(split=split)
    # row group by row group: reading a whole Parquet file at once would prefetch too much
    for row in stream.reshard().select_columns([column]):
        if text := (row[column] or "").strip():
            yield {"text": text}


def _find_column(source: str, column: str | None, features: Any) -> str:
    kinds = ("string", "large_string")
    texts = [name for name, kind in features.items() if getattr(kind, "dtype", "") in kinds]
    usual = [name for name in CAPTION_COLUMNS if name in texts]
    if column is None and usual:
        return usual[0]
    if column is not None and column in texts:
        return column
    choices = ", ".join(n for n in texts if not n.startswith("__")) or "none"
    if column is None:
        wrong = f"{source} has no column {', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}"
    elif column in features:
        wrong = f"column {column} of {source} holds no texts"
    else:
        wrong = f"{source} has no column {column}"
    raise ValueError(f"{wrong}; --caption_column can be one of those that hold texts: {choices}")
