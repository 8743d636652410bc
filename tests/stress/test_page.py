"""The page shows the committed figures."""

from __future__ import annotations

from tests.stress.page import MARKED, PAGE, written


def test_the_page_shows_the_committed_figures() -> None:
    text = PAGE.read_text()
    assert MARKED.search(text)
    assert written(text) == text
