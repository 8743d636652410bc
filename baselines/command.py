"""``pilotfish compare``: every method under one budget and one measurement."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from baselines.comparison.bench import Measurement
from baselines.comparison.comparison import Comparing
from baselines.comparison.methods import METHODS
from baselines.comparison.plan import Plan
from baselines.comparison.plots import pareto
from baselines.comparison.table import comparison_table
from pilotfish import bundled
from pilotfish.cli.names import model_sources, open_scorer
from pilotfish.data.prompts import load_prompts
from pilotfish.errors import Interrupted
from pilotfish.evaluation.plots import save
from pilotfish.evaluation.processes import is_main

QUICK: dict[str, Any] = {
    "max_train_steps": 8, "equal_seconds": False, "train_batch_size": 16, "samples": 16,
    "held_out": 8, "num_inference_steps": 10, "rounds": 1,
}  # fmt: skip


@dataclass(frozen=True)
class CompareConfig(Plan):
    """Train every method with an equal budget on one base, measure each there and, untouched, on
    every fine-tune. The same command goes on where it was stopped."""

    hosts: tuple[str, ...] = tuple(bundled.MODELS)
    """Pipelines, first the base to train on: base, fluent, twemoji, emojione, or folders or hub
    ids."""
    pictures: tuple[str, ...] = ()
    """Folders of real pictures (metadata.jsonl), one for each host that is not bundled."""
    train_prompts: str | None = None
    """Text file of prompts to train on. Left out: the embedded ones."""
    prompts: str | None = None
    """Text file of what is drawn; the judge must find each among all of them. Left out: the
    embedded captions."""
    held_out_prompts: str | None = None
    """Text file of prompts for the guidance error. Left out: the embedded ones."""
    judge: str | None = None
    """Folder of a CLIP that judges. Left out: the embedded judge."""
    seed: int = 0
    """Of the pictures."""
    quick: bool = False
    """A few steps and pictures on the first two hosts, to see it work in minutes; the figures mean
    little."""
    output_dir: str = "runs/compare"
    """Trainings, figures so far, plots."""
    output: str | None = None
    """The finished figures. Left out: compare.json in ``output_dir``."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        CompareConfig, args=list(arguments), prog="pilotfish compare", use_underscores=True,
        description=f"{CompareConfig.__doc__} Methods: {', '.join(METHODS)}.",
    )  # fmt: skip
    if config.quick:
        config = replace(config, hosts=config.hosts[:2], **QUICK)
    folder = Path(config.output_dir)
    names = load_prompts(config.prompts) if config.prompts else bundled.prompts("captions")
    held_out = (
        load_prompts(config.held_out_prompts)
        if config.held_out_prompts
        else bundled.prompts("held_out")
    )[: config.held_out]
    how = Measurement(
        names, held_out, config.samples, config.guidance_scale, config.num_inference_steps,
        config.seed,
    )  # fmt: skip
    training = {"prompts": config.train_prompts, "validation_prompts": config.held_out_prompts}
    if config.hosts[0] not in bundled.MODELS:
        training["pretrained_model_name_or_path"] = config.hosts[0]
    elif config.hosts[0] != "base":
        raise ValueError(f"{config.hosts[0]} is a fine-tune; the first host is the base")
    comparing = Comparing(
        config, model_sources(config.hosts, config.pictures), how,
        open_scorer(config.judge, config.hosts), folder, training=training,
        command=shlex.join(["pilotfish", "compare", *arguments]),
    )  # fmt: skip
    try:
        found = comparing.run()
    except Interrupted as error:
        raise Interrupted("stopped; the same command goes on from here") from error
    if not is_main():
        return
    if config.output:
        found.save(config.output)
    for budget in found.budgets:
        Console(width=160).print(comparison_table(found, budget))
        save(pareto(found, budget), folder / f"pareto-{budget}.png")
        print(f"saved {folder / f'pareto-{budget}.png'}")
    print(f"saved {config.output or comparing.file}")
