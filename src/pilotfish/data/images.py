"""Captioned images, read from a folder in the imagefolder format.

``<folder>/metadata.jsonl`` holds one ``{"file_name": ..., "text": ...}`` a line.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pilotfish.data.text_files import SKIP_HINT, checked_text, strip, text_lines
from pilotfish.errors import in_brief


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


def metadata_file(folder: str | Path) -> Path:
    """The file of a folder's captions.

    Raises:
        ValueError: there is none.
    """
    index = Path(folder) / "metadata.jsonl"
    if not index.is_file():
        raise ValueError(f'{folder} has no metadata.jsonl (one {{"file_name", "text"}} a line)')
    return index


def load_images(
    folder: str | Path, size: int | None = None, skip_missing: bool = False
) -> CaptionedImages:
    """Read every captioned image of ``folder`` as RGB.

    Args:
        size: the side of the squares that images are resized to. Default: as they are.
        skip_missing: skip the rows that have no text, and count them in a warning.

    Raises:
        ValueError: there is no ``metadata.jsonl``, it names no image, a file is not an image or a
            row has no text.
    """
    folder, index = Path(folder), metadata_file(folder)
    arrays, captions, skipped = [], [], 0
    for number, line in enumerate(text_lines(index), 1):
        place = f"{index}, line {number}"
        if not strip(line):
            continue
        try:
            row = json.loads(strip(line))
            name, text = row["file_name"], row.get("text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f'{place}: not {{"file_name", "text"}}: {in_brief(error)}') from error
        try:
            captions.append(checked_text(text))
        except ValueError as error:
            if not skip_missing:
                raise ValueError(f"{place}: {error}; {SKIP_HINT}") from None
            skipped += 1
            continue
        try:
            with Image.open(folder / name) as image:
                rgb = image.convert("RGB")
                arrays.append(np.asarray(rgb.resize((size, size)) if size else rgb))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{place}: {in_brief(error)}") from error
    if skipped:
        rows = len(captions) + skipped
        warnings.warn(f"{index}: {skipped} of {rows} rows without a text are skipped", stacklevel=2)
    if not arrays:
        raise ValueError(f"{index} names no image")
    if len({a.shape for a in arrays}) > 1:
        raise ValueError(f"the images of {folder} differ in size; pass size= to resize them")
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
    return CaptionedImages(pixels, captions)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] floats (N, 3, H, W), the output of a VAE, to uint8."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def from_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (N, 3, H, W) to floats in [-1, 1]."""
    return pixels.float() / 127.5 - 1
