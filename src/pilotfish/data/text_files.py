"""Text files in any Unicode encoding, from a file, a pipe or standard input.

UTF-8 and UTF-16 or UTF-32 with a byte order mark are read. Without a mark, UTF-16 and UTF-32 are
read if one of them is the only plausible encoding. Everything else, such as a Windows code page,
is refused, because no file says which one it is in. UTF-8 is written.
"""

from __future__ import annotations

import codecs
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryFile, mkstemp
from typing import IO, Any
from unicodedata import category

STANDARD_INPUT = "-"
SKIP_HINT = "distill --skip_missing_captions skips such rows"

_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_WITHOUT_MARK = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
_HEAD = 1 << 16
_LINE_END = re.compile(r"\r\n|\r|\n")
_INVALID = re.compile("[\0-\x08\x0e-\x1f\x7f\ud800-\udfff]")  # control characters, surrogates
# the byte order mark, which joined files have between lines; zero-width space; the end in DOS
_INVISIBLE = "\ufeff\u200b\x1a"


def open_utf8(path: str | Path) -> IO[bytes]:
    """A text file as seekable UTF-8: the file itself, or a temporary copy.

    Args:
        path: a file, a pipe, or "-" for standard input.

    Raises:
        ValueError: it cannot be read, or is not in the encoding that it begins with.
    """
    name = describe(path)
    try:
        file = _open_seekable(path)
        encoding = _detect(file)
        if encoding == "utf-8":
            return file
        with file:
            text = _decode(file.read(), encoding, name)
        copy = TemporaryFile()  # noqa: SIM115
        copy.write(text.encode())
        copy.seek(0)
        return copy
    except OSError as error:
        raise ValueError(f"{name} could not be read: {error.strerror or error}") from error


def read_lines(file: IO[bytes], name: str) -> Iterator[str]:
    r"""The lines of a UTF-8 file with their ends (``\n``, ``\r\n`` or ``\r``).

    Raises:
        ValueError: a line is not UTF-8; the message has its number.
    """
    number = 1
    for raw in file:
        text = _decode(raw, "utf-8", name, number)
        start = 0
        for end in _LINE_END.finditer(text):
            yield text[start : end.end()]
            start, number = end.end(), number + 1
        if start < len(text):
            yield text[start:]


def text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text file, see :func:`open_utf8` and :func:`read_lines`."""
    with open_utf8(path) as file:
        yield from read_lines(file, describe(path))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, all of it or nothing: the file that was there stays until the end. Its folder is
    made where it is missing.

    Raises:
        OSError: the disk refused.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def describe(path: str | Path) -> str:
    """What messages call a file."""
    return "standard input" if str(path) == STANDARD_INPUT else str(path)


def strip(text: str) -> str:
    """A text without surrounding white space and invisible characters."""
    while (stripped := text.strip().strip(_INVISIBLE)) != text:
        text = stripped
    return text


def checked_text(value: Any) -> str:
    """A prompt or caption, stripped.

    Raises:
        ValueError: it is missing, blank, not a text, or has control characters.
    """
    if value is None:
        raise ValueError("the text is missing")
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.60} is not a text")
    text = strip(value)
    if not text:
        raise ValueError("the text is blank")
    if found := _INVALID.search(text):
        code = ord(found[0])
        hint = "" if code else " (UTF-16 needs a byte order mark)"
        raise ValueError(f"the text holds the control character U+{code:04X}{hint}")
    return text


def _open_seekable(path: str | Path) -> IO[bytes]:
    if str(path) == STANDARD_INPUT:
        if sys.stdin is None:
            raise ValueError("standard input is closed")
        source: IO[bytes] = sys.stdin.buffer
    else:
        source = Path(path).open("rb")  # noqa: SIM115
        if S_ISREG(os.fstat(source.fileno()).st_mode):
            return source
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            f"{describe(path)} can be read by one process only; save it to a file for several"
        )
    copy = TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(source, copy)
    copy.seek(0)
    return copy


def _detect(file: IO[bytes]) -> str:
    head = file.read(_HEAD)
    file.seek(0)
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding
    if b"\0" not in head:
        return "utf-8"
    data = file.read()
    file.seek(0)
    plausible = [encoding for encoding in _WITHOUT_MARK if _is_plausible(data, encoding)]
    return plausible[0] if len(plausible) == 1 else "utf-8"


def _is_plausible(data: bytes, encoding: str) -> bool:
    """Whether bytes decode to assigned characters, ASCII or with ASCII white space among them.

    With the bytes of each character swapped, a line feed is unassigned and a space an en quad.
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return False
    characters = set(text)
    strange = {c for c in characters if c < "\U00010000" and category(c) in ("Cc", "Cn", "Co")}
    return strange <= set("\t\n\v\f\r\x1a") and (text.isascii() or bool(characters & set(" \n\r")))


def _decode(data: bytes, encoding: str, name: str, line: int = 1) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        # an incomplete character at the end of the part that is sound is left out
        sound = data[: error.start].decode(encoding, "ignore")
        line += len(_LINE_END.findall(sound))
        what = f"byte 0x{data[error.start]:02x} is not {encoding.upper()}"
        raise ValueError(
            f"{name}, line {line}: {what} ({error.reason}); save the file as UTF-8"
            + (" (it may be in a Windows code page)" if encoding == "utf-8" else "")
        ) from None
