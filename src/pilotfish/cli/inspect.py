"""``pilotfish inspect``: what a guide adds, and where, from noise to picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pilotfish.cli.names import guide, measured, steps
from pilotfish.evaluation import plots
from pilotfish.evaluation.inspection import inspect


@dataclass(frozen=True)
class InspectConfig:
    """What to look at."""

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"])] = ("owl",)
    """One or more prompts; several are averaged."""
    guide: str = "tiny"
    """Guide: tiny; tiny-16, tiny-8 or tiny-4 for so many steps; or a folder or hub id."""
    pretrained_model_name_or_path: str = "base"
    """Pipeline: base, fluent, twemoji, emojione, or a folder or hub id."""
    place: str | None = None
    """Where the maps are from: the name of a module. Left out: the last place before the
    prediction that has a map."""
    guidance_scales: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0)
    num_inference_steps: int | None = None
    """Left out: 25, or those that the guide was distilled to."""
    seed: int = 0
    output_dir: str = "runs/inspect"


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        InspectConfig, args=list(arguments), prog="pilotfish inspect", use_underscores=True
    )
    pipe, network = measured(config.pretrained_model_name_or_path), guide(config.guide)
    found = inspect(
        pipe, network, config.prompt, seed=config.seed, guidance_scales=config.guidance_scales,
        num_inference_steps=steps(pipe, network, config.num_inference_steps),
    )  # fmt: skip
    places = list(dict.fromkeys(a.place for a in found if a.map is not None))
    if not places:
        raise ValueError(f"{config.guide} adds nothing that has a map")
    inner = [p for p in places if p != "conv_out"]
    place = config.place or (inner or places)[-1]
    if place not in places:
        raise ValueError(f"nothing is added at {place}; there are {', '.join(places)}")
    folder = Path(config.output_dir)
    for name, figure in (
        ("maps", plots.added_maps(found, place)), ("strength", plots.added_strength(found, place)),
    ):  # fmt: skip
        plots.save(figure, folder / f"{name}.png")
        print(f"saved {folder / f'{name}.png'}")
