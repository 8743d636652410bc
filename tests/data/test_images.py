"""Captioned images from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pilotfish.data.images import from_pixels, load_images, to_pixels


def write(folder: Path, name: str, size: int = 8, mode: str = "RGB", tone: int = 200) -> None:
    shade = (tone, 10, 20, 128)[: len(mode)] if len(mode) > 1 else tone
    Image.new(mode, (size, size), shade).save(folder / name)


def index(folder: Path, *rows: object) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def row(name: str, text: str = "a cat") -> dict[str, str]:
    return {"file_name": name, "text": text}


def test_images_and_captions_keep_their_order(tmp_path: Path) -> None:
    write(tmp_path, "b.png", tone=1)
    write(tmp_path, "a.webp", tone=255)
    index(tmp_path, row("b.png", "first"), row("a.webp", "zweite ä"))
    found = load_images(tmp_path)
    assert found.captions == ["first", "zweite ä"]
    assert len(found) == 2
    assert found.pixels.shape == (2, 3, 8, 8)
    assert found.pixels.dtype == torch.uint8
    assert found.pixels[0, :, 0, 0].tolist() == [1, 10, 20]


def test_rows_and_columns_are_not_swapped(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[1, 5, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    index(tmp_path, row("a.png"))
    found = load_images(tmp_path).pixels
    assert found.shape == (1, 3, 4, 6)
    assert found.nonzero().tolist() == [[0, 2, 1, 5]]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    write(tmp_path, "a.png", mode=mode)
    index(tmp_path, row("a.png"))
    assert load_images(str(tmp_path)).pixels.shape == (1, 3, 8, 8)


def test_a_size_resizes(tmp_path: Path) -> None:
    write(tmp_path, "a.png", size=8)
    write(tmp_path, "b.png", size=12)
    index(tmp_path, row("a.png"), row("b.png"))
    assert load_images(tmp_path, size=4).pixels.shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match="differ in size"):
        load_images(tmp_path)


def test_a_folder_without_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no metadata\.jsonl"):
        load_images(tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        load_images(tmp_path / "nowhere")


def test_an_index_of_nothing_is_refused(tmp_path: Path) -> None:
    index(tmp_path)
    with pytest.raises(ValueError, match="names no image"):
        load_images(tmp_path)


def test_an_index_that_is_no_text_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.png")
    content = json.dumps(row("a.png", "käse"), ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"\n{content}\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: byte 0xe4 is not UTF-8"):
        load_images(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
def test_an_index_is_read_in_any_unicode_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    write(tmp_path, "a.png")
    content = json.dumps(row("a.png", "kä\u2028se"), ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"{content}{end} {end}{content}".encode(encoding))
    assert load_images(tmp_path).captions == ["kä\u2028se"] * 2


@pytest.mark.parametrize("text", [None, "", " \u200b", ["a"], 3, "c\0t", ...], ids=repr)
def test_a_missing_caption_is_refused_with_its_line_or_skipped(tmp_path: Path, text: Any) -> None:
    write(tmp_path, "a.png")
    bad = {"file_name": "gone.png"} | ({} if text is ... else {"text": text})
    index(tmp_path, row("a.png"), bad, row("a.png", "dog"))
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2: .*--skip_missing_captions"):
        load_images(tmp_path)
    with pytest.warns(UserWarning, match="1 of 3 rows without a text are skipped"):
        found = load_images(tmp_path, skip_missing=True)
    assert found.captions == ["a cat", "dog"]
    assert len(found.pixels) == 2


@pytest.mark.parametrize(
    "bad",
    [row("missing.png"), row("text.png"), {"file_name": "a.png"}, {"text": "x"}, ["a.png"], 3],
)
def test_a_bad_line_is_named_by_its_number(tmp_path: Path, bad: object) -> None:
    write(tmp_path, "a.png")
    (tmp_path / "text.png").write_text("not an image")
    index(tmp_path, row("a.png"), bad)
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 2"):
        load_images(tmp_path)


def test_a_truncated_image_is_refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    index(tmp_path, row("a.png"))
    with pytest.raises(ValueError, match="line 1"):
        load_images(tmp_path)


def test_pixels_come_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).repeat(1, 3, 1, 1)
    floats = from_pixels(pixels)
    assert floats.min() == -1
    assert floats.max() == 1
    assert torch.equal(to_pixels(floats), pixels)


@given(st.floats(-4, 4))
def test_every_value_becomes_a_pixel(value: float) -> None:
    found = to_pixels(torch.full((1, 3, 2, 2), value))
    back = from_pixels(found)[0, 0, 0, 0]
    assert back == pytest.approx(min(max(value, -1), 1), abs=1 / 127)
