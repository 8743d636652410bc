"""Results as strict JSON, written whole and read back with every field checked."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ResultError(ValueError):
    """A saved result cannot be read; the message names the field."""


class Saved:
    """A dataclass of numbers, texts, dicts and further dataclasses that can be saved."""

    def to_json(self) -> str:
        """Strict JSON; what is not a number is null."""
        me: Any = self  # what has this base is a dataclass
        return json.dumps(_nulls(asdict(me)), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ResultError: no JSON, a field that is missing, unknown or of another kind.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ResultError(f"the result is no JSON: {error}") from error
        return _build(cls, values, "result")

    def save(self, path: str | Path) -> None:
        """Write as JSON, all of it or nothing: a file that was there stays until the end."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved result.

        Raises:
            ResultError: the file cannot be read, or holds no result.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ResultError) as error:
            raise ResultError(f"no result could be read from {path}: {error}") from error


def _nulls(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    if isinstance(value, dict):
        return {k: _nulls(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _build(kind: type[T], value: Any, where: str) -> T:
    """A value of ``kind`` from parsed JSON; ``where`` names the place in errors."""
    made: Any
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ResultError(f"{where} must be an object")
        hints = get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise ResultError(f"{where} has unknown fields: {', '.join(unknown)}")
        optional = {
            f.name for f in fields(kind)
            if f.default is not MISSING or f.default_factory is not MISSING
        }  # fmt: skip
        if missing := [n for n in hints if n not in value and n not in optional]:
            raise ResultError(f"{where} lacks {', '.join(missing)}")
        made = kind(**{n: _build(hints[n], v, f"{where}.{n}") for n, v in value.items()})
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ResultError(f"{where} must be an object")
        inner = get_args(kind)[1]
        made = {k: _build(inner, v, f"{where}.{k}") for k, v in value.items()}
    elif kind is float:
        made = math.nan if value is None else value
        if isinstance(made, bool) or not isinstance(made, int | float):
            raise ResultError(f"{where} must be a number, not {value!r}")
        made = float(made)
    else:
        if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
            raise ResultError(f"{where} must be of type {kind.__name__}, not {value!r}")
        made = value
    return made  # type: ignore[no-any-return]
