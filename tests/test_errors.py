"""Errors of other libraries in one line."""

from __future__ import annotations

import pytest

from pilotfish.errors import in_brief


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("\n first\nsecond"), "first"),
        (KeyError("width"), "'width' is missing"),
        (OSError(), "OSError"),
        (RuntimeError("  \n "), "RuntimeError"),
    ],
)
def test_one_line_is_said(error: Exception, said: str) -> None:
    assert in_brief(error) == said
