"""Prompts in data sets of any kind, read from the disk by their index."""

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

from pilotfish.data import prompts
from pilotfish.data.prompts import open_prompts

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
    plain = prompts.open_column

    def open_column(where: str, *more: Any) -> Any:
        asked.append(where)
        return plain(where, *more)

    monkeypatch.setattr(prompts, "open_column", open_column)
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
