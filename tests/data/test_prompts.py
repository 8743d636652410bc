"""Prompts from text files and from data sets of any format, read from the disk by index."""

from __future__ import annotations

import builtins
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.data import prompts
from pilotfish.data.prompts import ConcatTexts, TextLines, load_prompts, open_prompts

TEXTS = ["red cat", " a dog ", "", None, "tac"]
FOUND = ["red cat", "a dog", "tac"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def parquet(path: Path, texts: Sequence[str | None] = TEXTS, column: str = "text") -> str:
    pq.write_table(pa.table({"n": list(range(len(texts))), column: list(texts)}), path)
    return str(path)


def shard(path: Path, texts: Sequence[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for i, text in enumerate(texts):
            for end, content in (("jpg", b"no picture is looked at"), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{path.stem}{i}.{end}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=40))
def test_lines_are_those_of_the_whole_text(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("lines") / "p.txt"
    path.write_bytes(text.encode())
    lines = TextLines(path)
    stripped = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    assert list(lines) == lines[:] == [line for line in stripped if line]


def test_texts_are_indexed_and_sliced(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("ä\n\nbc\r\n d \n", encoding="utf-8")
    lines = TextLines(path)
    assert (len(lines), lines[0], lines[-1], lines[1:]) == (3, "ä", "d", ["bc", "d"])
    with pytest.raises(IndexError):
        lines[3]
    joined = ConcatTexts(lines, ["e"], [], ["f"])
    assert (len(joined), joined[3], joined[-1], joined[1:4]) == (5, "e", "f", ["bc", "d", "e"])


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


def test_a_column_of_a_parquet_file(tmp_path: Path) -> None:
    found = open_prompts(parquet(tmp_path / "p.parquet"))
    assert list(found) == FOUND
    assert (found[-1], found[:2]) == ("tac", FOUND[:2])


def test_a_file_that_has_changed_is_read_again(tmp_path: Path) -> None:
    where = parquet(tmp_path / "p.parquet")
    assert list(open_prompts(where)) == FOUND
    parquet(tmp_path / "p.parquet", ["other"])
    assert list(open_prompts(where)) == ["other"]


def test_folders_patterns_and_shards(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    for i in range(2):
        parquet(tmp_path / "parts" / f"train-{i}.parquet", [f"cat {i}"])
        shard(tmp_path / f"{i}.tar", [f"dog {i}", f"tac {i}"])
    assert list(open_prompts(tmp_path / "parts")) == ["cat 0", "cat 1"]
    assert list(open_prompts(f"{tmp_path}/parts/*-1.parquet")) == ["cat 1"]
    assert list(open_prompts(f"{tmp_path}/*.tar")) == ["dog 0", "tac 0", "dog 1", "tac 1"]


def test_json_lines_and_csv(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps({"caption": t}) for t in FOUND))
    (tmp_path / "p.csv").write_text("\n".join(["caption", *FOUND]))
    for name in ("p.jsonl", "p.csv"):
        assert list(open_prompts(tmp_path / name)) == FOUND


def test_a_column_may_be_named(tmp_path: Path) -> None:
    where = parquet(tmp_path / "p.parquet", FOUND, "said")
    assert list(open_prompts(where, "said")) == FOUND
    with pytest.raises(ValueError, match=r"no column text, caption, prompt or txt;.* texts: said"):
        open_prompts(where)
    with pytest.raises(ValueError, match=r"has no column saying;.* texts: said"):
        open_prompts(where, "saying")
    with pytest.raises(ValueError, match=r"column n of .* holds no texts;.* texts: said"):
        open_prompts(where, "n")


def test_what_cannot_be_read_is_said_in_words(tmp_path: Path) -> None:
    broken = tmp_path / "p.parquet"
    broken.write_bytes(b"no parquet")
    (tmp_path / "empty").mkdir()
    whole = parquet(tmp_path / "q.parquet")
    for where, split in ((broken, "train"), (tmp_path / "empty", "train"), (whole, "dev"),
                         (tmp_path / "none-*.tar", "train")):  # fmt: skip
        with pytest.raises(ValueError, match="no prompts could be read from") as caught:
            open_prompts(where, split=split)
        assert str(where) in str(caught.value)
    with pytest.raises(ValueError, match="there is no prompt in its column text"):
        open_prompts(parquet(tmp_path / "r.parquet", ["", " "]))


@pytest.mark.parametrize("where", ["nobody/nothing", "nobody/nothing-v1.5", "nobody/nothing.txt"])
def test_what_is_neither_here_nor_on_the_hub_is_named(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    plain = prompts._open_column

    def _open_column(where: str, *more: Any) -> Any:
        asked.append(where)
        return plain(where, *more)

    monkeypatch.setattr(prompts, "_open_column", _open_column)
    with pytest.raises(ValueError, match=f"no prompts could be read from {where}"):
        open_prompts(where)
    assert asked == ([] if where.endswith(".txt") else [where])  # a file's name asks no hub


def test_the_package_that_reads_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "datasets":
            raise ModuleNotFoundError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'pilotfish\[datasets\]'"):
        open_prompts(parquet(tmp_path / "p.parquet"))
    (tmp_path / "p.txt").write_text("cat")  # a text file needs no package
    assert list(open_prompts(tmp_path / "p.txt")) == ["cat"]
