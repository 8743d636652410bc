"""``pilotfish scales``: the same seeds at several guidance scales, CFG above guided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pilotfish import bundled
from pilotfish.cli.names import guide, measured, steps
from pilotfish.cli.progress import shown
from pilotfish.evaluation.grids import draw_scales, scales_grid


@dataclass(frozen=True)
class ScalesConfig:
    """What to draw, at which scales and on which hosts."""

    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"])] = ("owl", "rocket")
    """One or more prompts; prompt i is drawn from seed ``seed + i``."""
    guide: str = "tiny"
    """Guide: tiny; tiny-16, tiny-8 or tiny-4 for so many steps; or a folder or hub id."""
    hosts: tuple[str, ...] = tuple(bundled.MODELS)
    """Pipelines: base, fluent, twemoji, emojione, or folders or hub ids."""
    guidance_scales: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0)
    num_inference_steps: int | None = None
    """Left out: 25, or those that the guide was distilled to."""
    seed: int = 0
    enlarge: int = 2
    """Pictures are shown so many times as large as they are."""
    output: str = "runs/scales.png"


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        ScalesConfig, args=list(arguments), prog="pilotfish scales", use_underscores=True
    )
    network, drawn = guide(config.guide), {}
    with shown() as progress:
        for i, name in enumerate(config.hosts):
            pipe = measured(name)
            drawn[name] = draw_scales(
                pipe, network, config.prompt, config.guidance_scales, seed=config.seed,
                num_inference_steps=steps(pipe, network, config.num_inference_steps),
            )  # fmt: skip
            progress("hosts", i + 1, len(config.hosts))
    Path(config.output).parent.mkdir(parents=True, exist_ok=True)
    scales_grid(config.guidance_scales, drawn, config.enlarge).save(config.output)
    print(f"saved {config.output}")
