"""Errors that several modules share, and errors of other libraries in one line."""

from __future__ import annotations


class MissingPackageError(RuntimeError):
    """A required package is not installed; the message says how to install it."""


class Interrupted(RuntimeError):
    """Work was asked to stop and has saved its state; the message says how to go on."""


def in_brief(error: BaseException) -> str:
    """The first line of an error's message; its type if the message is empty."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
