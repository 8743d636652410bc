"""Whether a value is what a field's type says: a file of settings may hold anything."""

from __future__ import annotations

import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


def needed(hint: Any, value: Any) -> str | None:
    """What a field of type ``hint`` needs, to be read after "must be"; None if ``value`` is that.

    Numbers must be finite, and text must be such as a file name or a prompt can hold: no NUL, no
    half of a surrogate pair.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        words = [needed(kind, value) for kind in inner]
        return None if None in words else " or ".join(str(word) for word in words)
    if origin is Literal:
        return None if value in inner else f"one of {', '.join(inner)}"
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return "a list"
        words = [word for v in value if (word := needed(inner[0], v)) is not None]
        return f"a list, each of it {words[0]}" if words else None
    holds, words_for_it = {
        NoneType: (lambda v: v is None, "nothing"),
        bool: (lambda v: type(v) is bool, "true or false"),
        int: (lambda v: type(v) is int, "a whole number"),
        float: (_is_number, "a number"),
        str: (_is_text, "text"),
    }[hint]
    return None if holds(value) else words_for_it


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
