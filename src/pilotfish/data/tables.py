"""Texts from a column of a CSV or JSON lines file, with their line for error messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pilotfish.data.text_files import strip, text_lines

TABLES = (".csv", ".tsv", ".json", ".jsonl")

CAPTION_COLUMNS = ("text", "caption", "prompt", "txt")
"""Names that a column of prompts usually has, in the order in which they are tried."""


def texts_of(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    """Places ("line 3") and values of a column, or of the lines of a text file.

    Raises:
        ValueError: the file cannot be parsed, or has no such column.
    """
    lines, suffix = text_lines(path), path.suffix.lower()
    if suffix == ".txt":
        yield from ((f"line {n}", line) for n, line in enumerate(lines, 1) if strip(line))
        return
    rows = _csv_rows(lines, path) if suffix in (".csv", ".tsv") else _json_rows(lines, path)
    head = list(islice(rows, 1000))
    columns: dict[str, bool] = {}
    for _, row in head:
        for name, value in row.items():
            columns[name] = columns.get(name, False) or isinstance(value, str)
    column = find_column(str(path), column, columns) if head else ""
    for place, row in chain(head, rows):
        yield place, row.get(column)


def _csv_rows(lines: Iterator[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = chain([next(lines, "").removeprefix("\ufeff")], lines)
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for fields in table:
            if not header:
                header = [field.strip() for field in fields]
            elif fields:
                if len(fields) != len(header):
                    raise csv.Error(
                        f"{len(fields)} fields under a header of {len(header)}; "
                        'put texts that hold the separator in "quotes"'
                    )
                yield f"line {table.line_num}", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num}: {error}") from error


def _json_rows(lines: Iterator[str], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    numbered = ((f"line {n}", line) for n, line in enumerate(map(strip, lines), 1) if line)
    first = next(numbered, None)
    if first is None:
        return
    rows: Iterable[tuple[str, Any]] = chain([first], numbered)
    if first[1].startswith("["):  # one array instead of a row a line
        whole = _parse_json("\n".join(line for _, line in rows), path, "")
        rows = ((f"row {n}", row) for n, row in enumerate(whole, 1))
    else:
        rows = ((place, _parse_json(line, path, place)) for place, line in rows)
    for place, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place}: {row!r:.60} is not an object with named columns")
        yield place, row


def _parse_json(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}{', ' if place else ''}{place}: not JSON: {error}") from error


def find_column(source: str, column: str | None, columns: Mapping[str, bool]) -> str:
    """The column asked for, or a usual one; ``columns`` says of each whether it holds texts."""
    found = [name for name in ([column] if column else CAPTION_COLUMNS) if name in columns]
    if found:
        return min(found, key=lambda name: not columns[name])
    usual = f"{', '.join(CAPTION_COLUMNS[:-1])} or {CAPTION_COLUMNS[-1]}"
    raise ValueError(f"{source} has no column {column or usual}; {column_choices(columns)}")


def column_choices(columns: Mapping[str, bool]) -> str:
    """What an error message says of the columns that could be asked for."""
    texts = [name for name, is_text in columns.items() if is_text and not name.startswith("__")]
    return f"--caption_column can be one of those that hold texts: {', '.join(texts) or 'none'}"
