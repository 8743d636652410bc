"""Captioned images, read from a folder in the imagefolder format.

``<folder>/metadata.jsonl`` holds one ``{"file_name": ..., "text": ...}`` a line.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError


@dataclass(frozen=True)
class CaptionedImages:
    """Captioned images in memory.

    Attributes:
        pixels: (N, 3, H, W), uint8.
        captions: N texts.
    """

    pixels: torch.Tensor
    captions: list[str]

    def __len__(self) -> int:
        return len(self.captions)


def load_images(folder: str | Path, size: int | None = None) -> CaptionedImages:
    """Read every captioned image of ``folder`` as RGB, resized to ``size`` squares if given.

    Raises:
        ValueError: there is no ``metadata.jsonl``, it names no image, or a file is not an image.
    """
    folder = Path(folder)
    index = folder / "metadata.jsonl"
    if not index.is_file():
        raise ValueError(f'{folder} has no metadata.jsonl (one {{"file_name", "text"}} a line)')
    arrays, captions = [], []
    for number, line in enumerate(_lines(index), 1):
        try:
            row = json.loads(line)
            with Image.open(folder / row["file_name"]) as image:
                rgb = image.convert("RGB")
                arrays.append(np.asarray(rgb.resize((size, size)) if size else rgb))
            captions.append(str(row["text"]))
        except (OSError, UnidentifiedImageError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}, line {number}: {error}") from error
    if not arrays:
        raise ValueError(f"{index} names no image")
    if len({a.shape for a in arrays}) > 1:
        raise ValueError(f"the images of {folder} differ in size; pass size= to resize them")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return CaptionedImages(pixels, captions)


def _lines(index: Path) -> list[str]:
    try:
        return index.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{index} could not be read: {error}") from error


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] floats (N, 3, H, W), the output of a VAE, to uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (N, 3, H, W) to floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1
