"""Prompts from text files as people have them, from pipes and from standard input."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pilotfish.data.prompts import load_prompts, open_prompts
from pilotfish.data.text_files import write_text

BYTE_ORDER_MARK = "\ufeff"
PROMPTS = {
    "latin": ["red cat", "käse", "a dog"],
    "cyrillic": ["красный кот", "собака"],
    "chinese": ["红色的猫", "狗"],
    "emoji": ["a 🐱 cat", "🫨"],
    "ascii": ["a"],
}
MARKED = {
    "utf-8": "utf-8", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "utf-32-le": "UTF-32",
    "utf-32-be": "UTF-32",
}  # fmt: skip

texts = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs")), max_size=40)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "p.txt"


@settings(max_examples=40)
@given(st.lists(texts, max_size=5))
def test_prompts_are_the_lines_that_are_not_blank(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "p.txt"
    path.write_bytes("\n".join(["first", *lines]).encode())
    expected = ["first", *(line.strip() for line in lines if line.strip())]
    prompts = open_prompts(path)
    assert list(prompts) == prompts[:] == expected
    assert prompts[-1] == expected[-1]
    with pytest.raises(IndexError):
        prompts[len(expected)]


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("mark", [BYTE_ORDER_MARK, ""], ids=["mark", "no mark"])
@pytest.mark.parametrize("encoding", MARKED)
def test_unicode_files_are_read(
    path: Path, prompts: list[str], end: str, mark: str, encoding: str
) -> None:
    path.write_bytes((mark + "".join(p + end for p in prompts)).encode(encoding))
    assert load_prompts(path) == prompts


@pytest.mark.parametrize(
    ("content", "prompts"),
    [
        ("\n  red cat \r\n\t\ndog", ["red cat", "dog"]),
        ("\ufeff\ufeffcat\n\ufeffdog\n", ["cat", "dog"]),  # files that were joined
        ("cat\n\u200b\n\u00a0\u3000\ndog", ["cat", "dog"]),  # lines that only look blank
        ("cat\r\ndog\r\n\x1a", ["cat", "dog"]),  # the end of a file in DOS
        ("a\rb\r\n\r\nc\n\rd", ["a", "b", "c", "d"]),
        ("one\u2028line\u0085of\x0btext", ["one\u2028line\u0085of\x0btext"]),
        ("👩‍🚀 in space", ["👩‍🚀 in space"]),  # a joiner inside is kept
    ],
)
def test_blank_lines_and_margins_are_dropped(path: Path, content: str, prompts: list[str]) -> None:
    path.write_bytes(content.encode())
    assert load_prompts(str(path)) == prompts


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("content", ["", "\n \n\t\n", "   ", "\ufeff", "\ufeff \r\n\u3000"])
def test_a_file_without_prompts_is_refused(path: Path, content: str, encoding: str) -> None:
    path.write_bytes(content.encode(encoding))
    with pytest.raises(ValueError, match=r"p\.txt holds no prompt"):
        load_prompts(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("red cat\nkäse\n".encode("cp1252"), "line 2: byte 0xe4 is not UTF-8"),
        ("red cat\rdog\r\nкот\n".encode("cp1251"), "line 3: byte 0xea is not UTF-8"),
        ("猫\n".encode("shift-jis"), "line 1: byte 0x94 is not UTF-8"),
        ("cat\n\n红色的猫".encode("gbk"), "line 3: byte 0xba is not UTF-8"),
        ("cat\nkäse".encode()[:-3], "line 2: byte 0xc3 is not UTF-8"),
        (b"\xff\xfe" + "cat\nd".encode("utf-16-le")[:-1], "line 2: byte 0x64 is not UTF-16"),
        (b"\xff\xfe" + "a\n".encode("utf-16-le") + b"\0\xd8b\0", "line 2: byte 0x00 is not UTF-16"),
        (b"\xff\xfe\0\0a\0\0\0\xff\xff\xff\xff", "line 1: byte 0xff is not UTF-32"),
        (b"cat\nd\0g\n", r"line 2: the text holds the control character U\+0000 \(UTF-16"),
        ("кот".encode("utf-16-le"), r"line 1: the text holds the control character U\+0004"),
        ("猫\u3000犬".encode("utf-16-le"), "line 1: "),
        (b"\x1b[31mcat\x1b[0m\n", r"line 1: the text holds the control character U\+001B"),
    ],
    ids=["cp1252", "cp1251", "shift-jis", "gbk", "truncated UTF-8", "truncated UTF-16",
         "lone surrogate", "UTF-32", "NUL", "UTF-16 without spaces", "ambiguous UTF-16", "colours"],
)  # fmt: skip
def test_what_is_no_text_is_refused_with_its_line(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"p\\.txt, {message}") as caught:
        load_prompts(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere could not be read: No such file"):
        load_prompts(tmp_path / "nowhere")


@pytest.fixture(params=["fifo", "descriptor", "standard input"])
def pipe(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A pipe to read prompts from, and the descriptor to write them to."""
    if request.param == "fifo":
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        keep = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        writing = os.open(fifo, os.O_WRONLY)
        os.set_blocking(keep, True)
        yield str(fifo), writing
        os.close(keep)
        return
    reading, writing = os.pipe()
    if request.param == "descriptor":  # as in --prompts <(grep cat all.txt)
        yield f"/dev/fd/{reading}", writing
        os.close(reading)
        return
    with pytest.MonkeyPatch.context() as patch, os.fdopen(reading) as stream:
        patch.setattr(sys, "stdin", stream)
        yield "-", writing


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_prompts_are_read_from_a_pipe(pipe: tuple[str, int], encoding: str) -> None:
    source, writing = pipe
    content = "".join(f"{i} cats\n" for i in range(20_000)).encode(encoding)  # more than it holds

    def write() -> None:
        with os.fdopen(writing, "wb") as file:
            file.write(content)

    writer = threading.Thread(target=write)
    writer.start()
    prompts = open_prompts(source)
    writer.join()
    assert len(prompts) == 20_000
    assert prompts[:2] == ["0 cats", "1 cats"]
    assert prompts[-1] == prompts[19_999] == "19999 cats"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_is_refused_where_it_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=r"p\.parquet is a pipe; .* needs a file"):
        open_prompts(tmp_path / "p.parquet")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"cat\n")))
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process would read a part
    with pytest.raises(ValueError, match="standard input can be read by one process only"):
        open_prompts("-")


def test_an_empty_pipe_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    with pytest.raises(ValueError, match="standard input holds no prompt"):
        load_prompts("-")


def test_brackets_in_the_name_of_a_file_are_no_pattern(tmp_path: Path) -> None:
    path = tmp_path / "prompts [v2].txt"
    path.write_text("cat\n")
    assert load_prompts(path) == ["cat"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files that are no text")
@pytest.mark.parametrize("terminal", ["ascii", "cp1251", "utf-8"])
def test_messages_can_be_printed_on_any_terminal(tmp_path: Path, terminal: str) -> None:
    path = tmp_path / "кот-käse-\udcff.txt"
    path.write_bytes("käse\x1b".encode())
    script = (
        "import sys\nfrom pilotfish.data.prompts import load_prompts\n"
        "try:\n    load_prompts(sys.argv[1])\n"
        "except ValueError as error:\n    print(error, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, check=False,
        env=os.environ | {"PYTHONIOENCODING": f"{terminal}:strict"},
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr.strip().endswith(b"line 1: the text holds the control character U+001B")


def test_a_text_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "made" / "history.json"
    write_text(file, "first\n")
    monkeypatch.setattr("os.fsync", Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_text(file, "second\n")
    assert file.read_bytes() == b"first\n"
    assert list(file.parent.iterdir()) == [file]
