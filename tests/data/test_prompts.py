"""Prompts from a text file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.data.prompts import load_prompts

words = st.text(st.characters(codec="utf-8", categories=("L", "N")), min_size=1, max_size=8)


@given(st.lists(words, min_size=1, max_size=8))
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert load_prompts(path) == lines


def test_blank_lines_and_margins_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\n  red cat \r\n\t\ndog")
    assert load_prompts(str(path)) == ["red cat", "dog"]


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="holds no prompt; write one a line"):
        load_prompts(path)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xff\xfe\x00\x81")
    for bad in (path, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="no prompts could be read") as caught:
            load_prompts(bad)
        assert str(bad) in str(caught.value)
