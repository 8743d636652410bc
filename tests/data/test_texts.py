"""Texts that stay on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.data.texts import Joined, Lines


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=40))
def test_lines_are_those_of_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("lines") / "p.txt"
    path.write_bytes(text.encode())
    lines = Lines(path)
    stripped = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    assert list(lines) == lines[:] == [line for line in stripped if line]


def test_they_are_found_by_index_and_slice(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("ä\n\nbc\r\n d \n", encoding="utf-8")
    lines = Lines(path)
    assert (len(lines), lines[0], lines[-1], lines[1:]) == (3, "ä", "d", ["bc", "d"])
    with pytest.raises(IndexError):
        lines[3]
    joined = Joined(lines, ["e"], [], ["f"])
    assert (len(joined), joined[3], joined[-1], joined[1:4]) == (5, "e", "f", ["bc", "d", "e"])
