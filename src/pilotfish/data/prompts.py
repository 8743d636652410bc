"""Prompts: one a line in a text file."""

from __future__ import annotations

from pathlib import Path


def load_prompts(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file.

    Raises:
        ValueError: the file is missing, no text, or holds no prompt.
    """
    path = Path(path)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"no prompts could be read from {path}: {error}") from error
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts
