"""Prompts from data sets of any format, read from the disk by index."""

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
from pilotfish.data.prompts import ConcatTexts, fingerprint, load_prompts, open_prompts

TEXTS = ["red cat", " a dog ", "\ufefftac"]
FOUND = ["red cat", "a dog", "tac"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def parquet(path: Path, texts: Sequence[Any] = TEXTS, column: str = "text") -> str:
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


def as_jsonl(path: Path, rows: Sequence[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_json(path: Path, rows: Sequence[Any]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def as_parquet(path: Path, rows: Sequence[Any]) -> None:
    parquet(path, [row.get("text") for row in rows])


def as_csv(path: Path, rows: Sequence[Any]) -> None:
    lines = [f'{n},"{row["text"] or ""}"' for n, row in enumerate(rows)]
    path.write_text("\n".join(["n,text", *lines]))


def as_shards(path: Path, rows: Sequence[Any]) -> None:
    with tarfile.open(path, "w") as tar:
        for n, row in enumerate(rows):
            text = row.get("text")
            for end, content in (("jpg", b""), ("txt", None if text is None else text.encode())):
                if content is not None:
                    member = tarfile.TarInfo(f"{n}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


ROWS = [{"text": text} for text in FOUND]
WRITERS = {"p.jsonl": as_jsonl, "p.json": as_json, "p.parquet": as_parquet, "p.csv": as_csv,
           "p.tar": as_shards}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name, ROWS)
    assert list(open_prompts(tmp_path / name)) == load_prompts(tmp_path / name) == FOUND


BAD = [{"text": None}, {"text": ""}, {"text": " \u200b "}, {"text": "c\0t"}, {}, {"text": ["a"]},
       {"text": 3}]  # fmt: skip
ALLOWED = {"p.csv": BAD[:4], "p.parquet": BAD[:5], "p.tar": BAD[:5]}


@pytest.mark.parametrize(
    ("name", "bad"), [(name, bad) for name in WRITERS for bad in ALLOWED.get(name, BAD)]
)
def test_a_missing_caption_is_refused_with_its_row_or_skipped(
    tmp_path: Path, name: str, bad: dict[str, Any]
) -> None:
    path = tmp_path / name
    WRITERS[name](path, [*ROWS * 2, bad, *ROWS, bad])
    with pytest.raises(ValueError, match=r"(row|line) (7|8): .*--skip_missing_captions") as caught:
        open_prompts(path)
    assert str(path) in str(caught.value)
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match="2 of 11 rows without a text are skipped"):
            assert list(open_prompts(path, skip_missing=True)) == FOUND * 3


def test_only_missing_captions_are_no_prompts(tmp_path: Path) -> None:
    where = parquet(tmp_path / "p.parquet", [None, ""])
    with (
        pytest.warns(UserWarning, match="2 of 2 rows"),
        pytest.raises(ValueError, match="holds no prompt"),
    ):
        open_prompts(where, skip_missing=True)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_tables_are_read_in_any_unicode_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    (tmp_path / "p.csv").write_bytes(f'text,n{end}käse,1{end}"a, b",2{end}{end}'.encode(encoding))
    lines = ['{"n": 1, "text": "käse"}', "", '{"n": 2, "text": "a, b"}']
    (tmp_path / "p.jsonl").write_bytes(end.join(lines).encode(encoding))
    for name in ("p.csv", "p.jsonl", "*.csv"):
        assert list(open_prompts(tmp_path / name)) == ["käse", "a, b"]


def test_names_in_capitals_and_tabs_between_columns(tmp_path: Path) -> None:
    (tmp_path / "P.CSV").write_text("n,text\n1,cat\n")
    (tmp_path / "p.tsv").write_text("n\ttext\n1\ta, b\n")
    assert load_prompts(tmp_path / "P.CSV") == ["cat"]
    assert load_prompts(tmp_path / "p.tsv") == ["a, b"]


def test_folders_of_text_files(tmp_path: Path) -> None:
    """The library of data sets reads neither another encoding nor a comma in a text."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "train-1.txt").write_bytes("cat\n\nkäse\n".encode("utf-16"))
    (tmp_path / "a" / "train-2.txt").write_bytes(b"dog")
    (tmp_path / "a" / "test.txt").write_bytes(b"held out")
    assert load_prompts(tmp_path / "a") == ["cat", "käse", "dog"]
    assert load_prompts(f"{tmp_path}/a/train-*.txt") == ["cat", "käse", "dog"]
    assert open_prompts(tmp_path / "a", split="test")[:] == ["held out"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "p.csv").write_bytes(b"text\na cat, red\n")
    with pytest.raises(ValueError, match=r"p\.csv, line 2: 2 fields under a header of 1"):
        open_prompts(tmp_path / "b")
    with pytest.raises(ValueError, match=r"nothing-\*\.txt: no such files"):
        open_prompts(f"{tmp_path}/nothing-*.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "text\nä\n".encode("cp1252"), "line 2: byte 0xe4 is not UTF-8"),
        ("p.jsonl", '{"text": "ä"}'.encode("cp1252"), "line 1: byte 0xe4 is not UTF-8"),
        ("p.csv", b"text\na cat, red\n", r"line 2: 2 fields under a header of 1; .*quotes"),
        ("p.csv", b'text\ndog\n"a cat\n', "line 3: unexpected end of data"),
        ("p.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ("p.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2: \['b'\] is not an object"),
        ("p.json", b'[{"text": "a"}', "not JSON"),
    ],
)
def test_a_table_that_is_not_sound_is_refused_with_its_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_prompts(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_the_first_usual_column_with_texts_is_taken(tmp_path: Path) -> None:
    as_jsonl(tmp_path / "p.jsonl", [{"text": 3, "caption": "cat"}, {"text": 4, "caption": "dog"}])
    assert list(open_prompts(tmp_path / "p.jsonl")) == ["cat", "dog"]
    with pytest.raises(ValueError, match="line 1: 3 is not a text"):
        open_prompts(tmp_path / "p.jsonl", "text")


def test_sequences_are_joined(tmp_path: Path) -> None:
    joined = ConcatTexts(open_prompts(parquet(tmp_path / "p.parquet")), ["e"], [], ["f"])
    assert (len(joined), joined[3], joined[-1], joined[1:4]) == (5, "e", "f", ["a dog", "tac", "e"])


def test_a_column_may_be_named(tmp_path: Path) -> None:
    where = parquet(tmp_path / "p.parquet", FOUND, "said")
    assert list(open_prompts(where, "said")) == FOUND
    with pytest.raises(ValueError, match=r"no column text, caption, prompt or txt;.* texts: said"):
        open_prompts(where)
    with pytest.raises(ValueError, match=r"has no column saying;.* texts: said"):
        open_prompts(where, "saying")
    with pytest.raises(ValueError, match=r"column n of .* holds int64, no texts;.* texts: said"):
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


@pytest.mark.parametrize("where", ["nobody/nothing", "nobody/nothing-v1.5", "nobody/nothing.txt"])
def test_what_is_neither_here_nor_on_the_hub_is_named(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    plain = prompts._read_column

    def _read_column(where: str, *more: Any) -> Any:
        asked.append(where)
        return plain(where, *more)

    monkeypatch.setattr(prompts, "_read_column", _read_column)
    with pytest.raises(ValueError, match=f"{where}"):
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


def test_the_fingerprint_is_that_of_the_texts_not_of_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [str(i) for i in range(10)]
    (tmp_path / "p.txt").write_text("\n".join(texts))
    plain = fingerprint(texts)
    assert plain.startswith("10 texts with the SHA-256 ")
    assert fingerprint(open_prompts(tmp_path / "p.txt")) == plain
    others = (texts[::-1], [*texts[:5], "x", *texts[6:]], texts[:-1], ["01", "", *texts[2:]])
    assert plain not in map(fingerprint, others)
    monkeypatch.setattr(prompts, "FINGERPRINT_ENDS", 2)
    read = Unread(texts)
    assert fingerprint(read) != fingerprint([*texts[:-1], "x"])
    assert read.indices == [0, 1, 8, 9]


class Unread(list[str]):
    """Notes what is read."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__(texts)
        self.indices: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.indices.append(index)
        return super().__getitem__(index)
