"""The prompt files of public benchmarks: COCO captions, DrawBench, PartiPrompts, and pairs of a
prompt and a negative prompt."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from pilotfish.data.prompts import load_prompts, open_prompts
from pilotfish.data.tables import texts_of
from pilotfish.data.text_files import checked_text, strip, text_lines
from pilotfish.errors import in_brief

PROMPT_COLUMNS = ("prompt", "prompts", "text", "caption")
"""Names of a column of prompts, in any case: DrawBench has ``Prompts``, PartiPrompts ``Prompt``."""


def load_captions(file: str | Path) -> list[str]:
    """One prompt an image, or the prompts of a benchmark.

    Args:
        file: ``captions_val2017.json`` of COCO: of each image the caption of the lowest id, by the
            id of the image. A JSON object ``{image: caption}``: in its order. A CSV or TSV with a
            column of :data:`PROMPT_COLUMNS`. Any other text file: one prompt a line.

    Raises:
        ValueError: it cannot be read, has no such column or holds no prompt; a text is missing.
    """
    path = Path(file)
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _json_captions(path)
    if suffix == ".tsv":
        return _tsv_prompts(path)
    if suffix == ".csv":
        header = _stripped(next(csv.reader(text_lines(path)), []))
        return open_prompts(path, _prompt_column(header))[:]
    return load_prompts(path)


def load_pairs(file: str | Path) -> list[tuple[str, str]]:
    """Pairs of a prompt and a negative prompt.

    Args:
        file: a CSV, TSV or JSON lines file with the columns ``prompt`` and ``negative_prompt``.

    Raises:
        ValueError: it cannot be read, lacks a column, or has no pair; a text is missing.
    """
    path = Path(file)
    columns = [
        [_text(value, f"{path}, {place}") for place, value in texts_of(path, column)]
        for column in ("prompt", "negative_prompt")
    ]
    found = list(zip(*columns, strict=True))
    if not found:
        raise ValueError(f"{path} holds no pair of a prompt and a negative prompt")
    return [(prompt, negative) for prompt, negative in found]


def _tsv_prompts(path: Path) -> list[str]:
    """The column of prompts of a TSV. Quotes are part of a text: in PartiPrompts some begin with
    a quoted word."""
    rows = [line.rstrip("\r\n").split("\t") for line in text_lines(path) if strip(line)]
    header, found = _stripped(rows[0] if rows else []), list[str]()
    column = _prompt_column(header)
    if column is None:
        raise ValueError(f"{path} has no column {' or '.join(PROMPT_COLUMNS)}")
    place = header.index(column)
    for number, row in enumerate(rows[1:], 2):
        found.append(_text(row[place] if place < len(row) else None, f"{path}, row {number}"))
    if not found:
        raise ValueError(f"{path} holds no prompt")
    return found


def _stripped(header: list[str]) -> list[str]:
    return [strip(name) for name in header]


def _prompt_column(header: list[str]) -> str | None:
    """The name of the column of prompts, as the header spells it."""
    names = {name.lower(): name for name in reversed(header)}
    return next((names[name] for name in PROMPT_COLUMNS if name in names), None)


def _json_captions(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"no captions could be read from {path}: {in_brief(error)}") from error
    if isinstance(found, dict) and "annotations" in found:
        captions = list(_first_captions(path, found["annotations"]).values())
    elif isinstance(found, dict):
        captions = [_text(text, f"{path}, image {image}") for image, text in found.items()]
    else:
        raise ValueError(f"{path} holds neither COCO's annotations nor {{image: caption}}")
    if not captions:
        raise ValueError(f"{path} holds no caption")
    return captions


def _first_captions(path: Path, annotations: Any) -> dict[int, str]:
    """Of each image the caption with the lowest id, by the id of the image."""
    try:
        rows = [(int(row["image_id"]), int(row["id"]), row["caption"]) for row in annotations]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: an annotation is not {{image_id, id, caption}}: {in_brief(error)}"
        ) from error
    first: dict[int, str] = {}
    for image, number, text in sorted(rows, key=lambda row: row[:2]):
        if image not in first:
            first[image] = _text(text, f"{path}, annotation {number}")
    return first


def _text(value: Any, place: str) -> str:
    """A text on one line.

    Raises:
        ValueError: it is missing or blank.
    """
    try:
        return " ".join(checked_text(value).split())
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
