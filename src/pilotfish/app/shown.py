"""Pictures and figures as a page and a file show them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape

import torch
from PIL import Image

from pilotfish.app.drawing import Picture
from pilotfish.app.request import Request
from pilotfish.evaluation.grids import enlarged, host_grid, scales_grid
from pilotfish.evaluation.ways import TITLES

SIDE, SMALL = 320, 128
"""Pixels to which a small picture is enlarged, alone and in a strip."""


def times(image: torch.Tensor, side: int = SIDE) -> int:
    """How many times (3, H, W) is enlarged, so that it is at least as large as ``side``."""
    return max(1, -(-side // max(image.shape[1:])))


def picture(image: torch.Tensor, side: int = SIDE) -> Image.Image:
    """(3, H, W) in [-1, 1], large enough to be looked at."""
    return enlarged(image, times(image, side))


def figures(drawn: Sequence[Picture]) -> str:
    """What pictures took together, as HTML."""
    passes, seconds = sum(p.passes for p in drawn), sum(p.seconds for p in drawn)
    return f'<span class="figures"><b>{passes}</b> passes, <b>{seconds:.2f}</b> s</span>'


def grid(request: Request, drawn: Mapping[str, Picture]) -> Image.Image:
    """The three ways side by side, as a picture to keep."""
    columns = {way: p.image[None] for way, p in drawn.items()}
    prompt = request.prompt or "(no prompt)"
    return host_grid([prompt], columns, times(drawn["cfg"].image, 2 * SMALL))


def strip_grid(scales: Sequence[float], rows: Mapping[str, Sequence[Picture]]) -> Image.Image:
    """CFG above guided at several w, as a picture to keep."""
    stacks = {TITLES[way]: torch.stack([p.image for p in row]) for way, row in rows.items()}
    return scales_grid(scales, {"": stacks}, times(rows["cfg"][0].image, SMALL))


def strip(request: Request, scales: Sequence[float], rows: Mapping[str, Sequence[Picture]]) -> str:
    """CFG above guided at several w, as HTML that holds its pictures."""
    cells = ["<span></span>", *(f'<span class="w">w = {w:g}</span>' for w in scales)]
    for way, row in rows.items():
        cells.append(f'<span class="way">{TITLES[way]}{figures(row)}</span>')
        for w, drawn in zip(scales, row, strict=True):
            image = picture(drawn.image, 2 * SMALL)
            alt = escape(f"{request.prompt}, {TITLES[way]}, w = {w:g}")
            cells.append(f'<img src="{_uri(image)}" alt="{alt}">')
    columns = f"auto repeat({len(scales)}, minmax(3rem, {SMALL}px))"
    return f'<div class="strip" style="grid-template-columns: {columns}">{"".join(cells)}</div>'


def file_name(request: Request, *more: str) -> str:
    """The name of a file to keep, without its ending: prompt, host, seed and so on."""
    words = (request.prompt[:40], request.host.rsplit("/")[-1], f"seed {request.seed}", *more)
    return re.sub(r"[^a-z0-9.]+", "-", " ".join(words).lower()).strip("-.") or "pilotfish"


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
