"""``pilotfish sample``: pictures, guided in one pass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from PIL import Image
from tqdm import tqdm

from pilotfish.cli.names import guide, measured, steps
from pilotfish.data.images import to_pixels
from pilotfish.data.prompts import load_prompts
from pilotfish.evaluation.grids import contact_sheet
from pilotfish.pipelines.sampling import sample


@dataclass(frozen=True)
class SampleConfig:
    """What to draw."""

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"])] = ()
    """One or more prompts."""
    prompts: str | None = None
    """Text file, one prompt a line."""
    pretrained_model_name_or_path: str = "base"
    """Pipeline: base, fluent, twemoji, emojione, or a folder or hub id of your own."""
    guide: str = "tiny"
    """Guide: tiny; tiny-16, tiny-8 or tiny-4 for so many steps; or a folder or hub id."""
    guidance: Literal["guided", "cfg", "none"] = "guided"
    """guided: one pass with the guide. cfg: two passes. none: one pass, no guidance."""
    negative_prompt: str | None = None
    guidance_scale: float = 4.0
    num_inference_steps: int | None = None
    """Left out: 25, or those that the guide was distilled to."""
    num_images_per_prompt: int = 1
    seed: int = 0
    batch_size: int = 16
    output_dir: str = "runs/samples"
    sheet: str | None = None
    """PNG file: all pictures on one sheet, numbered, without their prompts."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        SampleConfig, args=list(arguments), prog="pilotfish sample", use_underscores=True
    )
    texts = list(config.prompt) + (load_prompts(config.prompts) if config.prompts else [])
    if not texts:
        raise ValueError("nothing to draw: give --prompt TEXT or --prompts FILE")
    if config.num_images_per_prompt < 1:
        raise ValueError(
            f"--num_images_per_prompt must be at least 1, not {config.num_images_per_prompt}"
        )
    texts = [text for text in texts for _ in range(config.num_images_per_prompt)]
    pipe = measured(config.pretrained_model_name_or_path)
    network = guide(config.guide) if config.guidance == "guided" else None
    made = sample(
        pipe, texts, seeds=range(config.seed, config.seed + len(texts)),
        guidance_scale=1.0 if config.guidance == "none" else config.guidance_scale,
        num_inference_steps=steps(pipe, network, config.num_inference_steps),
        batch_size=config.batch_size,
        guide=network,
        negative_prompts=(
            None if config.negative_prompt is None else [config.negative_prompt] * len(texts)
        ),
    )  # fmt: skip
    folder, images = Path(config.output_dir), []
    folder.mkdir(parents=True, exist_ok=True)
    for one in tqdm(made, total=len(texts), desc="sample"):
        if config.sheet:
            images.append(one.image.cpu())
        name = re.sub(r"[^a-z0-9]+", "-", one.prompt.lower()).strip("-")[:60] or "picture"
        pixels = to_pixels(one.image).permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(folder / f"{name}-{one.seed}.png")
    print(f"{len(texts)} pictures in {folder}")
    if config.sheet:
        Path(config.sheet).parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(torch.stack(images)).save(config.sheet)
        print(f"saved {config.sheet}")
