"""Prompts: one a line in a text file, or a column of a data set. However many they are, a
training reads each when its turn comes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pilotfish.data.columns import BUILDERS, open_column
from pilotfish.data.texts import Lines

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.txt)")


def load_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    Raises:
        ValueError: the file is missing, no text, or holds no prompt.
    """
    return _lines(Path(path))[:]


def open_prompts(
    where: str | Path, column: str | None = None, split: str = "train"
) -> Sequence[str]:
    """Prompts by their index, read from the disk when they are asked for.

    Args:
        where: a text file, one prompt a line; a Parquet, CSV or JSON lines file, webdataset
            shards (``.tar``), several of those by a pattern such as ``shards/*.tar``, or a folder
            of them; or a data set's id on the hub.
        column: of a data set. Left out: text, caption, prompt or txt, the first there is.
        split: of a data set that has several.

    Raises:
        ValueError: nothing is there, it holds no prompt or no such column, or the package that
            reads it is not installed.
    """
    path = Path(where)
    pattern = any(c in path.name for c in "*?[")
    if path.is_dir() or pattern or path.suffix in BUILDERS:
        return open_column(str(where), column, split)
    if not path.exists() and _HUB_ID.fullmatch(str(where)):
        return open_column(str(where), column, split)
    return _lines(path)


def _lines(path: Path) -> Lines:
    try:
        lines = Lines(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"no prompts could be read from {path}: {error}") from error
    if not lines:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return lines
