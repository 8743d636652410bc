"""``pilotfish steps``: how good pictures are against the number of sampling steps."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from baselines.comparison.methods import METHODS
from pilotfish import bundled
from pilotfish.cli.evaluate import choose_hosts
from pilotfish.cli.names import guide, judge
from pilotfish.cli.progress import shown
from pilotfish.data.prompts import load_prompts
from pilotfish.evaluation.plots import save, step_curves
from pilotfish.evaluation.spread import is_main
from pilotfish.evaluation.steps import STEPS, score_steps
from pilotfish.evaluation.table import steps_table
from pilotfish.pipelines.sampling import Attachable

RULES = {name: method.rule for name, method in METHODS.items() if method.rule}


@dataclass(frozen=True)
class StepsConfig:
    """Draw without guidance, with CFG and with guides, with few steps and with many, and judge.
    The same command goes on where it was stopped."""

    guides: tuple[str, ...] = ("tiny",)
    """Guides: tiny, tiny-16 and so on, or folders or hub ids; or guidance-interval,
    adaptive-guidance. NAME=GUIDE calls it so; guides for different numbers of steps that have one
    name make one line."""
    hosts: tuple[str, ...] = tuple(bundled.MODELS)
    """Pipelines, the base first: base, fluent, twemoji, emojione, or folders or hub ids."""
    pictures: tuple[str, ...] = ()
    """Folders of real pictures (metadata.jsonl), one for each host that is not bundled."""
    prompts: str | None = None
    """Text file of what is drawn; the judge must find each among all of them. Left out: the
    embedded captions."""
    judge: str | None = None
    """Folder of a CLIP that judges. Left out: the embedded judge."""
    steps: tuple[int, ...] = STEPS
    """Numbers of sampling steps; a guide that was distilled to few steps takes its own alone."""
    samples: int = 300
    """Pictures for each cell of the table."""
    seed: int = 0
    guidance_scale: float = 4.0
    batch_size: int = 32
    rounds: int = 3
    """Rounds of the side-by-side timing."""
    output: str = "runs/steps.json"
    """JSON file of the result; plots go beside it."""


def named(texts: Sequence[str]) -> dict[str, list[Attachable]]:
    """Methods by the name of their way."""
    found: dict[str, list[Attachable]] = {}
    for text in texts:
        name, _, given = text.rpartition("=")
        rule = RULES.get(given)
        found.setdefault(name or Path(given).name, []).append(rule() if rule else guide(given))
    return found


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        StepsConfig, args=list(arguments), prog="pilotfish steps", use_underscores=True
    )
    unfinished = Path(f"{config.output}.unfinished")
    with shown() as progress:
        result = score_steps(
            choose_hosts(config.hosts, config.pictures), named(config.guides),
            names=load_prompts(config.prompts) if config.prompts else bundled.prompts("captions"),
            command=shlex.join(["pilotfish", "steps", *arguments]), steps=config.steps,
            samples=config.samples, seed=config.seed, guidance_scale=config.guidance_scale,
            batch_size=config.batch_size, rounds=config.rounds,
            judge=judge(config.judge, config.hosts), unfinished=unfinished, progress=progress,
        )  # fmt: skip
    if not is_main():
        return
    result.save(config.output)
    unfinished.unlink(missing_ok=True)
    for host in result.hosts:
        Console(width=120).print(steps_table(result, host))
        plot = Path(config.output).with_name(f"{Path(config.output).stem}-{host}.png")
        save(step_curves(result, host), plot)
        print(f"saved {plot}")
    print(f"saved {config.output}")
