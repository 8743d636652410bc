"""Errors of other libraries, told to a person."""

from __future__ import annotations


def in_brief(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
