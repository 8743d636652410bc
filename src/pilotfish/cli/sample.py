"""``pilotfish sample``: images with a guide, with CFG or without guidance."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from diffusers.utils.torch_utils import get_device
from PIL import Image
from tqdm import tqdm

from pilotfish import bundled
from pilotfish.backbones import Backbone
from pilotfish.cli.names import Dtype, open_guide, open_model, sampling_steps, usable_device
from pilotfish.data.prompts import load_prompts
from pilotfish.guidance import GuidanceMode
from pilotfish.guidances import CFG, Guidance
from pilotfish.pipelines import Reference, Refreshed
from pilotfish.pipelines.sampling import middle_frame, sample, to_pil
from pilotfish.refresh import check_refresh


@dataclass(frozen=True)
class SampleConfig:
    """Sample images and save each as a PNG file, and all together as grid.png. Videos are saved
    as GIF files; in grid.png are their middle frames."""

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"])] = ()
    """One or more prompts."""
    prompts: str | None = None
    """Text file, one prompt a line."""
    models: tuple[str, ...] = ("base",)
    """Pipelines: base, fluent, twemoji, emojione, step-lora, high-contrast, monotone, streamline;
    sd3, sd3-fluent, sd3-twemoji, sd3-emojione; or folders or hub ids. With more than one, each has
    a folder of its own in --output."""
    guide: str | None = None
    """Guide: tiny, or sd3-tiny for sd3; tiny-16, tiny-8, tiny-4, sd3-tiny-16, sd3-tiny-8 or
    sd3-tiny-4 for so many steps; or a folder or hub id. Left out: that of the bundled base."""
    mode: Literal["none", "cfg", "guided"] = "guided"
    """guided: the guide, with both passes in the steps of --refresh. cfg: two passes. none: one
    pass, no guidance."""
    teacher: Guidance = CFG
    """What takes CFG's place in --mode cfg."""
    negative_prompt: str | None = None
    guidance_scale: float = 4.0
    """w; 1 is no guidance."""
    refresh: int | None = None
    """How many steps run both passes, denser at high noise; after each the guide is given the
    difference between the two predictions. Left out: the guide's own ratio of the steps."""
    refresh_at: tuple[int, ...] = ()
    """In place of --refresh: the steps that run both passes, counted from 0."""
    num_inference_steps: int | None = None
    """Left out: 25, or those that the guide was distilled for."""
    num_frames: int | None = None
    """Frames of a video: 1 more than a multiple of what the pipeline takes for one latent, such as
    49. Left out: the pipeline's own number."""
    num_images_per_prompt: int = 1
    seed: int = 0
    """Seed of the first image; each further image has the next one."""
    batch_size: int = 16
    """Images in one call."""
    variant: str | None = None
    """Variant of the weight files, such as fp16, of models that come in no other."""
    dtype: Dtype = "float32"
    """Precision of the models."""
    device: str | None = None
    """Left out: an accelerator if there is one."""
    output: str = "runs/samples"
    """Folder of the images."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        SampleConfig, args=list(arguments), prog="pilotfish sample", use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    prompts = list(config.prompt) + (load_prompts(config.prompts) if config.prompts else [])
    if not prompts:
        raise ValueError("no prompt: give --prompt TEXT or --prompts FILE")
    if config.num_images_per_prompt < 1:
        raise ValueError(
            f"--num_images_per_prompt must be at least 1, not {config.num_images_per_prompt}"
        )
    if config.teacher != CFG and config.mode != "cfg":
        raise ValueError(f"--guidance {config.teacher.guidance} has no effect without --mode cfg")
    if config.refresh is not None and config.refresh_at:
        raise ValueError("--refresh and --refresh_at cannot be combined; give one of them")
    check_refresh(config.refresh_at or config.refresh or 0)
    names = [Path(model).name for model in config.models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two models are called {twice[0]}; rename one of the folders")
    device = usable_device(config.device or get_device())
    for model, name in zip(config.models, names, strict=True):
        folder = Path(config.output) / (name if len(names) > 1 else "")
        pipe = open_model(model, config.dtype, config.variant).to(device)
        sample_model(pipe, prompts, folder, config, config.guide or bundled.guide_of(model))


def sample_model(
    pipe: Any, prompts: Sequence[str], folder: Path, config: SampleConfig, guide: str
) -> None:
    """Sample every prompt with one pipeline; save the images and their grid in ``folder``."""
    mode = GuidanceMode(config.mode)
    network = open_guide(guide) if mode == GuidanceMode.GUIDED else None
    steps = sampling_steps(pipe, network, config.num_inference_steps)  # refuses a guide
    backbone = Backbone.of_pipeline(pipe)
    if backbone.needs_image(pipe):
        raise ValueError(
            f"a {type(pipe).__name__} needs an image as input: attach the guide and call the "
            "pipeline itself"
        )
    texts = [text for text in prompts for _ in range(config.num_images_per_prompt)]
    method = Reference(config.teacher)
    samples = sample(
        pipe, texts, seeds=range(config.seed, config.seed + len(texts)),
        guidance_scale=1.0 if mode == GuidanceMode.NONE else config.guidance_scale,
        num_inference_steps=steps, num_frames=config.num_frames, batch_size=config.batch_size,
        guide=Refreshed(network, config.refresh_at or config.refresh) if network else method,
        negative_prompts=(
            None if config.negative_prompt is None else [config.negative_prompt] * len(texts)
        ),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for one in tqdm(samples, total=len(texts), desc="sample"):
        (image,) = to_pil(pipe, middle_frame(one.image))
        name = re.sub(r"[^a-z0-9]+", "-", one.prompt.lower()).strip("-")[:60] or "image"
        if one.image.ndim == 3:
            image.save(folder / f"{name}-{one.seed}.png")
        else:
            save_gif(
                to_pil(pipe, one.image), folder / f"{name}-{one.seed}.gif", backbone.frame_rate
            )
        images.append(image)
    columns = config.num_images_per_prompt
    image_grid(images, columns if columns > 1 else math.ceil(math.sqrt(len(images)))).save(
        folder / "grid.png"
    )
    kind = "images" if backbone.temporal_factor is None else "videos"
    print(f"{len(images)} {kind} and grid.png in {folder}")


def save_gif(frames: Sequence[Image.Image], file: Path, frame_rate: int) -> None:
    """Write frames as a GIF that repeats; ``frame_rate`` is a second's."""
    frames[0].save(
        file, save_all=True, append_images=frames[1:], duration=round(1000 / frame_rate), loop=0
    )


def image_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size, row by row."""
    width, height = images[0].size
    columns = min(columns, len(images))
    grid = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % columns * width, i // columns * height))
    return grid
