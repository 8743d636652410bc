"""``pilotfish inspect``: what a guide adds, and where, from noise to image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pilotfish import bundled
from pilotfish.backbones import Backbone
from pilotfish.cli.names import model_on_device, open_guide, sampling_steps
from pilotfish.cli.progress import progress_bars
from pilotfish.evaluation import plots
from pilotfish.evaluation.grids import draw_scales, scales_grid
from pilotfish.evaluation.inspection import added_maps, added_strength, inspect
from pilotfish.guides import Guide
from pilotfish.pipelines.attach import check


@dataclass(frozen=True)
class InspectConfig:
    """Draw what a guide adds at one of its sites, for several guidance scales: maps.png and
    strength.png. With --scales, draw the images at each guidance scale in their place, CFG above
    guided."""

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"])] = ("owl",)
    """One or more prompts, prompt i from seed ``seed + i``. Maps are the mean over them."""
    guide: str | None = None
    """Guide: tiny, or sd3-tiny for sd3; tiny-16, tiny-8, tiny-4, sd3-tiny-16, sd3-tiny-8 or
    sd3-tiny-4 for so many steps; or a folder or hub id. Left out: that of the bundled base."""
    models: tuple[str, ...] = ("base",)
    """Pipelines: base, fluent, twemoji, emojione, step-lora, high-contrast, monotone, streamline;
    sd3, sd3-fluent, sd3-twemoji, sd3-emojione; or folders or hub ids. Several with --scales, side
    by side."""
    site: str | None = None
    """Site of the maps: the name of a module. Left out: the last site before the prediction
    that has a map."""
    guidance_scales: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0)
    """Each w that is drawn."""
    scales: str | None = None
    """PNG or JPEG file: the images at each guidance scale, CFG above guided."""
    enlarge: int = 2
    """Factor by which the images of --scales are enlarged."""
    num_inference_steps: int | None = None
    """Left out: 25, or those that the guide was distilled for."""
    num_frames: int | None = None
    """Frames of a video: 1 more than a multiple of what the pipeline takes for one latent, such as
    49. Left out: the pipeline's own number."""
    seed: int = 0
    variant: str | None = None
    """Variant of the weight files, such as fp16, of models that come in no other."""
    output: str = "runs/inspect"
    """Folder of maps.png and strength.png. No effect with --scales."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        InspectConfig, args=list(arguments), prog="pilotfish inspect", use_underscores=True
    )
    name = config.guide or bundled.guide_of(config.models[0])
    if config.scales is not None:
        _draw_scales(config, open_guide(name), Path(config.scales))
        return
    if len(config.models) != 1:
        raise ValueError(f"{len(config.models)} models, but maps are of one; add --scales")
    pipe, guide = (
        model_on_device(config.models[0], variant=config.variant),
        open_guide(name),
    )
    found = inspect(
        pipe, guide, config.prompt, seed=config.seed, guidance_scales=config.guidance_scales,
        num_inference_steps=sampling_steps(pipe, guide, config.num_inference_steps),
        num_frames=config.num_frames,
    )  # fmt: skip
    sites = list(dict.fromkeys(a.site for a in found if a.map is not None))
    if not sites:
        raise ValueError(f"{name} adds nothing that has a map")
    head = Backbone.of_pipeline(pipe).sites()["head"]["module"]
    inner = [site for site in sites if site != head]
    site = config.site or (inner or sites)[-1]
    if site not in sites:
        raise ValueError(f"nothing is added at {site}; there are {', '.join(sites)}")
    folder = Path(config.output)
    for what, figure in (
        ("maps", added_maps(found, site)), ("strength", added_strength(found, site)),
    ):  # fmt: skip
        plots.save(figure, folder / f"{what}.png")
        print(f"saved {folder / f'{what}.png'}")


def _draw_scales(config: InspectConfig, guide: Guide, file: Path) -> None:
    drawn = {}
    with progress_bars() as progress:
        for i, name in enumerate(config.models):
            pipe = model_on_device(name, variant=config.variant)
            check(guide, pipe)  # before a bar is shown
            progress("models", i, len(config.models))
            drawn[name] = draw_scales(
                pipe, guide, config.prompt, config.guidance_scales, seed=config.seed,
                num_inference_steps=sampling_steps(pipe, guide, config.num_inference_steps),
                num_frames=config.num_frames,
            )  # fmt: skip
            progress("models", i + 1, len(config.models))
    file.parent.mkdir(parents=True, exist_ok=True)
    scales_grid(config.guidance_scales, drawn, config.enlarge).save(file)
    print(f"saved {file}")
