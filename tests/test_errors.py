"""Errors of other libraries in one line."""

from __future__ import annotations

import pytest

from pilotfish.errors import in_brief


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("\n first\nsecond"), "first"),
        (KeyError("width"), "'width' is missing"),
        (OSError(), "OSError"),
        (RuntimeError("  \n "), "RuntimeError"),
    ],
)
def test_the_first_line_is_kept(error: Exception, expected: str) -> None:
    assert in_brief(error) == expected
