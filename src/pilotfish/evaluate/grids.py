"""Grids of pictures: rows are prompts; columns are no guidance, CFG and guided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from pilotfish.data.pictures import to_pixels
from pilotfish.evaluate.hosts import Host
from pilotfish.evaluate.ways import TITLES, WAYS, three_ways
from pilotfish.guides import Guide

INK, FAINT, GROUND = "#26323d", "#6b7884", "white"
GAP, LABEL, LINE, LETTERS = 8, 132, 18, 14

# way -> (N, 3, H, W) pictures in [-1, 1], one a prompt
Columns = Mapping[str, torch.Tensor]


def draw_host(
    pipe: Any,
    guide: Guide,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    guidance_scale: float = 4.0,
    num_inference_steps: int = 25,
    batch_size: int = 16,
) -> dict[str, torch.Tensor]:
    """Pictures of every prompt in the three ways, prompt i from seed ``seed + i``."""
    seeds = [seed + i for i in range(len(prompts))]
    batches = list(
        three_ways(
            pipe, guide, prompts, seeds, guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps, batch_size=batch_size,
        )
    )  # fmt: skip
    return {way: torch.cat([b[way].images for b in batches]) for way in WAYS}


def host_grid(prompts: Sequence[str], columns: Columns, scale: int = 2) -> Image.Image:
    """One host: three columns."""
    return wide_grid(prompts, {"": columns}, scale)


def wide_grid(prompts: Sequence[str], hosts: Mapping[str, Columns], scale: int = 2) -> Image.Image:
    """Several hosts side by side, three columns each under the host's name.

    Args:
        prompts: the rows.
        hosts: name -> pictures; a name that is empty gets no line of its own.
        scale: pictures are enlarged by it (Lanczos), so that small art is seen.

    Raises:
        ValueError: no prompt, no host, or as many pictures as prompts are not there.
    """
    if not prompts or not hosts:
        raise ValueError("a grid needs at least one prompt and one host")
    for name, columns in hosts.items():
        for way in WAYS:
            if len(columns[way]) != len(prompts):
                raise ValueError(
                    f"{name or 'the host'}, {way}: {len(columns[way])} pictures "
                    f"of {len(prompts)} prompts"
                )
    height, width = (scale * n for n in next(iter(hosts.values()))["cfg"].shape[2:])
    group = len(WAYS) * (width + GAP) + GAP
    named = any(hosts)
    top = GAP + LINE * (1 + named) + GAP
    size = (LABEL + len(hosts) * group, top + len(prompts) * (height + GAP))
    sheet = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(sheet)
    for h, (name, columns) in enumerate(hosts.items()):
        left = LABEL + h * group + GAP
        if name:
            middle = left + (group - 2 * GAP) / 2
            pen.text((middle, GAP + LINE / 2), name, INK, _font(LETTERS + 2), anchor="mm")
        for c, way in enumerate(WAYS):
            x = left + c * (width + GAP)
            at = (x + width / 2, GAP + LINE * (named + 0.5))
            pen.text(at, TITLES[way], FAINT, _narrow(TITLES[way], width, pen), anchor="mm")
            for r, picture in enumerate(columns[way]):
                sheet.paste(enlarged(picture, scale), (x, top + r * (height + GAP)))
    room = max(1, height // LINE)
    for r, prompt in enumerate(prompts):
        lines = _fit(prompt, LABEL - 2 * GAP, pen)[:room]
        y = top + r * (height + GAP) + (height - LINE * (len(lines) - 1)) / 2
        for i, line in enumerate(lines):
            pen.text((LABEL - GAP, y + i * LINE), line, INK, _font(LETTERS), anchor="rm")
    return sheet


def scales_grid(
    scales: Sequence[float], rows: Mapping[str, torch.Tensor], scale: int = 2
) -> Image.Image:
    """One prompt and seed at several guidance scales.

    Args:
        scales: w of the columns.
        rows: title -> (N, 3, H, W) pictures in [-1, 1], one a w.
        scale: pictures are enlarged by it.

    Raises:
        ValueError: no w, no row, or a row that has not as many pictures as there are w.
    """
    if not scales or not rows:
        raise ValueError("a grid needs at least one guidance scale and one row")
    for title, pictures in rows.items():
        if len(pictures) != len(scales):
            raise ValueError(f"{title}: {len(pictures)} pictures of {len(scales)} guidance scales")
    height, width = (scale * n for n in next(iter(rows.values())).shape[2:])
    top = GAP + LINE + GAP
    size = (LABEL + GAP + len(scales) * (width + GAP), top + len(rows) * (height + GAP))
    sheet = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(sheet)
    for r, (title, pictures) in enumerate(rows.items()):
        y = top + r * (height + GAP)
        pen.text((LABEL - GAP, y + height / 2), title, INK, _font(LETTERS), anchor="rm")
        for c, (w, picture) in enumerate(zip(scales, pictures, strict=True)):
            x = LABEL + GAP + c * (width + GAP)
            sheet.paste(enlarged(picture, scale), (x, y))
            if not r:
                at = (x + width / 2, GAP + LINE / 2)
                pen.text(at, f"w = {w:g}", FAINT, _font(LETTERS - 1), anchor="mm")
    return sheet


def contact_sheet(images: torch.Tensor, columns: int = 5, scale: int = 2) -> Image.Image:
    """(N, 3, H, W) pictures in [-1, 1] row by row, numbered from 1 and without their names,
    so that somebody can be asked what they are.

    Raises:
        ValueError: no picture.
    """
    if not len(images):
        raise ValueError("a sheet needs at least one picture")
    height, width = (scale * n for n in images.shape[2:])
    rows = -(-len(images) // columns)
    cell, row = width + GAP, height + LINE + GAP
    sheet = Image.new("RGB", (GAP + columns * cell, GAP + rows * row), GROUND)
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(images):
        x, y = GAP + i % columns * cell, GAP + i // columns * row
        sheet.paste(enlarged(picture, scale), (x, y))
        at = (x + width / 2, y + height + LINE / 2)
        pen.text(at, str(i + 1), FAINT, _font(LETTERS - 1), anchor="mm")
    return sheet


def draw_hosts(
    hosts: Mapping[str, Host], guide: Guide, prompts: Sequence[str],
    progress: Callable[[str, int, int], None] | None = None, **settings: Any,
) -> dict[str, dict[str, torch.Tensor]]:  # fmt: skip
    """:func:`draw_host` of every host, one loaded at a time."""
    drawn = {}
    for i, (name, host) in enumerate(hosts.items()):
        drawn[name] = draw_host(host.load(), guide, prompts, **settings)
        if progress:
            progress("grids", i + 1, len(hosts))
    return drawn


def enlarged(image: torch.Tensor, scale: int) -> Image.Image:
    """(3, H, W) in [-1, 1], enlarged by Lanczos."""
    pixels = to_pixels(image[None])[0].permute(1, 2, 0).cpu().numpy()
    height, width = (scale * n for n in image.shape[1:])
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _narrow(
    text: str, width: int, pen: ImageDraw.ImageDraw
) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest letters in which ``text`` fits over a column."""
    sizes = range(LETTERS - 1, 4, -1)
    fits = (n for n in sizes if pen.textlength(text, _font(n)) <= width)
    return _font(next(fits, sizes[-1]))


def _fit(text: str, width: int, pen: ImageDraw.ImageDraw) -> list[str]:
    """Lines of whole words that fit into ``width`` pixels; a longer word stands alone."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and pen.textlength(longer, _font(LETTERS)) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines or [""]
