"""A column of texts in a data set of any kind that the ``datasets`` library reads.

Its texts are written once, without empty ones, into an Arrow file in that library's cache,
which is then mapped into memory rather than read. Pictures beside them are not copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pilotfish.data.texts import Texts
from pilotfish.errors import in_brief

BUILDERS = {
    ".parquet": "parquet", ".tar": "webdataset", ".csv": "csv", ".json": "json", ".jsonl": "json",
    ".arrow": "arrow",
}  # fmt: skip
"""Which reader a file's name asks for."""
NAMES = ("text", "caption", "prompt", "txt")
"""What a column of prompts is called where nobody says."""


class Column(Texts):
    """Texts in a mapped Arrow file."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def one(self, index: int) -> str:
        text: str = self.rows[index]["text"]
        return text


def open_column(where: str, column: str | None = None, split: str = "train") -> Column:
    """The texts of a column, without their margins and without empty ones.

    Args:
        where: a file, a pattern, a folder, or an id on the hub.
        column: its name; left out, the first of ``NAMES`` that there is.

    Raises:
        ValueError: nothing can be read there, no such column or split, a column of something
            else, no text in it, or ``datasets`` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{where} is read by the datasets library: pip install 'pilotfish[datasets]'"
        ) from error
    try:
        builder = _builder(where)
        stream = builder.as_streaming_dataset(split=split)
        features = stream.features or stream._resolve_features().features
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(f"no prompts could be read from {where}: {in_brief(error)}") from error
    column = _chosen(where, column, features)
    files = builder.config.data_files or {}
    # what is in the cache is known by these: a file that has changed is read again
    seen = {name: (list(some), some.origin_metadata) for name, some in files.items()}
    what = {"where": where, "column": column, "split": split, "seen": repr(seen)}
    try:
        if next(_texts(**what), None) is None:
            raise ValueError(f"there is no prompt in its column {column}")
        rows = datasets.Dataset.from_generator(
            _texts, gen_kwargs=what, features=datasets.Features({"text": datasets.Value("string")})
        )
    except Exception as error:
        raise ValueError(f"no prompts could be read from {where}: {in_brief(error)}") from error
    return Column(rows)


def _builder(where: str) -> Any:
    from datasets import load_dataset_builder

    kind = BUILDERS.get(Path(where).suffix)
    return load_dataset_builder(kind, data_files=where) if kind else load_dataset_builder(where)


def _texts(where: str, column: str, split: str, seen: str) -> Iterator[dict[str, str]]:
    stream = _builder(where).as_streaming_dataset(split=split)
    # one row group after another: of a whole Parquet file more is read ahead than is wanted
    for row in stream.reshard().select_columns([column]):
        if text := (row[column] or "").strip():
            yield {"text": text}


def _chosen(where: str, column: str | None, features: Any) -> str:
    kinds = ("string", "large_string")
    texts = [name for name, kind in features.items() if getattr(kind, "dtype", "") in kinds]
    usual = [name for name in NAMES if name in texts]
    if column is None and usual:
        return usual[0]
    if column is not None and column in texts:
        return column
    there = ", ".join(n for n in texts if not n.startswith("__")) or "none"
    if column is None:
        wrong = f"{where} has no column {', '.join(NAMES[:-1])} or {NAMES[-1]}"
    elif column in features:
        wrong = f"column {column} of {where} holds no texts"
    else:
        wrong = f"{where} has no column {column}"
    raise ValueError(f"{wrong}; --caption_column can be one of those that hold texts: {there}")
