"""Errors that several rooms share, and errors of other libraries in one line."""

from __future__ import annotations


class MissingPackageError(RuntimeError):
    """A package that is needed is not installed; the message says how to install it."""


def in_brief(error: BaseException) -> str:
    """The first line of what an error says; its kind where it says nothing."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
