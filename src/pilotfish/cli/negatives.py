"""``pilotfish negatives``: a guide against CFG with negative prompts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from pilotfish import bundled
from pilotfish.cli.evaluate import choose_hosts
from pilotfish.cli.names import guide, judge
from pilotfish.cli.progress import shown
from pilotfish.data.prompts import load_prompts
from pilotfish.evaluation.negative import measure_negatives
from pilotfish.evaluation.spread import is_main
from pilotfish.evaluation.table import negatives_table


@dataclass(frozen=True)
class NegativesConfig:
    """Measure a guide with negative prompts against CFG with the same ones, beside the same guide
    told of none. The same command goes on where it was stopped."""

    guide: str = "tiny"
    """Guide: tiny (or tiny-16, tiny-8, tiny-4, with as many steps), or a folder or hub id."""
    hosts: tuple[str, ...] = tuple(bundled.MODELS)
    """Pipelines, the base first: base, fluent, twemoji, emojione, or folders or hub ids."""
    held_out_prompts: str | None = None
    """Text file of prompts that the guide does not know; each is the negative prompt of another.
    Left out: the embedded held-out ones."""
    judge: str | None = None
    """Folder of a CLIP that judges. Left out: the embedded judge."""
    seed: int = 0
    guidance_scale: float = 4.0
    """w of the pictures; the guidance error is taken at 2, 4 and 7."""
    num_inference_steps: int = 25
    batch_size: int = 32
    output: str = "runs/negative.json"
    """JSON file of the result."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        NegativesConfig, args=list(arguments), prog="pilotfish negatives", use_underscores=True
    )
    held_out = (
        load_prompts(config.held_out_prompts)
        if config.held_out_prompts
        else bundled.prompts("held_out")
    )
    unfinished = Path(f"{config.output}.unfinished")
    with shown() as progress:
        result = measure_negatives(
            choose_hosts(config.hosts, ()), guide(config.guide),
            held_out,
            guide_name=config.guide, command=shlex.join(["pilotfish", "negatives", *arguments]),
            judge=judge(config.judge, config.hosts), seed=config.seed,
            guidance_scale=config.guidance_scale, batch_size=config.batch_size,
            num_inference_steps=config.num_inference_steps, unfinished=unfinished,
            progress=progress,
        )  # fmt: skip
    if is_main():
        result.save(config.output)
        unfinished.unlink(missing_ok=True)
        Console().print(negatives_table(result))
        print(f"saved {config.output}")
