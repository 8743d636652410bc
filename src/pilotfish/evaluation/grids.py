"""Grids of images: prompts by method, or by guidance scale; models side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from pilotfish.data.images import to_pixels
from pilotfish.evaluation.images import TITLES, ModelSource, Progress, draw
from pilotfish.guides import Guide
from pilotfish.pipelines import Reference, Refreshed
from pilotfish.pipelines.sampling import Attachable

INK, FAINT, GROUND = "#26323d", "#6b7884", "white"
GAP, LABEL, LINE, LETTERS = 8, 132, 18, 14


def draw_models(
    sources: Mapping[str, ModelSource],
    columns: Mapping[str, tuple[float, Attachable | None]],
    prompts: Sequence[str],
    *,
    seed: int = 0,
    num_inference_steps: int = 25,
    num_frames: int | None = None,
    progress: Progress | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """Images of every prompt by model and column, prompt i from seed ``seed + i``; what
    :func:`sheet` takes. One model is loaded at a time.

    Args:
        columns: title -> w of the call, and what is attached for it.
        num_frames: of a video, which its middle frame stands for; left out, the pipeline's own
            number.
    """
    drawn, seeds = {}, [seed + i for i in range(len(prompts))]
    report = progress or (lambda what, done, total: None)
    report("grids", 0, len(sources))
    for i, (name, source) in enumerate(sources.items()):
        pipe = source.load()
        drawn[name] = {
            title: draw(
                pipe, prompts, seeds, guidance_scale=w, guide=method,
                num_inference_steps=num_inference_steps, num_frames=num_frames,
            ).images
            for title, (w, method) in columns.items()
        }  # fmt: skip
        report("grids", i + 1, len(sources))
    return drawn


def draw_scales(
    pipe: Any, guide: Guide, prompts: Sequence[str], guidance_scales: Sequence[float], *,
    seed: int = 0, num_inference_steps: int = 25, num_frames: int | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Images of every prompt by CFG and guided, at several w from the same noise.

    Args:
        num_frames: as of :func:`draw_models`.

    Returns:
        "<prompt>, CFG" and "<prompt>, guided" -> (N, 3, H, W) in [-1, 1], one a w.
    """
    rows: dict[str, list[torch.Tensor]] = {
        f"{prompt}, {TITLES[mode]}": [] for prompt in prompts for mode in ("cfg", "guided")
    }
    seeds = [seed + i for i in range(len(prompts))]
    methods: dict[str, Attachable] = {
        "cfg": Reference(guide.guidance), "guided": Refreshed(guide, 0)
    }  # fmt: skip
    for w in guidance_scales:
        for mode, method in methods.items():
            made = draw(
                pipe, prompts, seeds, guidance_scale=w, guide=method,
                num_inference_steps=num_inference_steps, num_frames=num_frames,
            )  # fmt: skip
            for prompt, image in zip(prompts, made.images, strict=True):
                rows[f"{prompt}, {TITLES[mode]}"].append(image)
    return {title: torch.stack(images) for title, images in rows.items()}


def scales_grid(
    scales: Sequence[float], models: Mapping[str, Mapping[str, torch.Tensor]], scale: int = 2
) -> Image.Image:
    """The same rows at several guidance scales, one or more models side by side.

    Args:
        scales: w of the columns.
        models: name -> title of a row -> (N, 3, H, W) images in [-1, 1], one a w; every model
            has the same rows.

    Raises:
        ValueError: a row that has not as many images as there are w; and what :func:`sheet`
            raises.
    """
    for rows in models.values():
        for title, images in rows.items():
            if len(images) != len(scales):
                raise ValueError(f"{title}: {len(images)} images of {len(scales)} guidance scales")
    groups = {
        name: {
            f"w = {w:g}": torch.stack([images[i] for images in rows.values()])
            for i, w in enumerate(scales)
        }
        for name, rows in models.items()
        if rows
    }
    return sheet(list(next(iter(models.values()), ())), groups, scale)


def sheet(
    rows: Sequence[str], groups: Mapping[str, Mapping[str, torch.Tensor]], scale: int = 2
) -> Image.Image:
    """Images in rows and in groups of columns.

    Args:
        rows: their names.
        groups: name -> title of a column -> (N, 3, H, W) images in [-1, 1], one a row; a group
            whose name is empty gets no line of its own.
        scale: images are enlarged by it (Lanczos), so that small art is seen.

    Raises:
        ValueError: no row, no column, or a column that has not a image for every row.
    """
    if not rows or not groups or not all(groups.values()):
        raise ValueError("a grid needs at least one row and one column")
    for name, columns in groups.items():
        for title, images in columns.items():
            if len(images) != len(rows):
                where = f"{name}, {title}" if name else title
                raise ValueError(f"{where}: {len(images)} images of {len(rows)} rows")
    first = next(iter(groups.values()))
    height, width = (scale * n for n in next(iter(first.values())).shape[2:])
    named = any(groups)
    top = GAP + LINE * (1 + named) + GAP
    columns_wide = sum(len(columns) for columns in groups.values()) * (width + GAP)
    size = (LABEL + columns_wide + len(groups) * GAP, top + len(rows) * (height + GAP))
    paper = Image.new("RGB", size, GROUND)
    pen = ImageDraw.Draw(paper)
    x = LABEL + GAP
    for name, columns in groups.items():
        if name:
            middle = x + (len(columns) * (width + GAP) - GAP) / 2
            pen.text((middle, GAP + LINE / 2), name, INK, _font(LETTERS + 2), anchor="mm")
        for title, images in columns.items():
            at = (x + width / 2, GAP + LINE * (named + 0.5))
            pen.text(at, title, FAINT, _narrow(title, width, pen), anchor="mm")
            for r, image in enumerate(images):
                paper.paste(_enlarged(image, scale), (x, top + r * (height + GAP)))
            x += width + GAP
        x += GAP
    room = max(1, height // LINE)
    for r, row in enumerate(rows):
        lines = _fit(row, LABEL - 2 * GAP, pen)[:room]
        y = top + r * (height + GAP) + (height - LINE * (len(lines) - 1)) / 2
        for i, line in enumerate(lines):
            pen.text((LABEL - GAP, y + i * LINE), line, INK, _font(LETTERS), anchor="rm")
    return paper


def _enlarged(image: torch.Tensor, scale: int) -> Image.Image:
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
