"""``pilotfish evaluate``: a guide on a base and its fine-tunes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import tyro
from rich.console import Console

from pilotfish import bundled
from pilotfish.cli.names import guide, judge, measured
from pilotfish.cli.progress import shown
from pilotfish.data.prompts import load_prompts
from pilotfish.evaluation.evaluation import evaluate
from pilotfish.evaluation.grids import draw_hosts, wide_grid
from pilotfish.evaluation.hosts import Host
from pilotfish.evaluation.spread import is_main
from pilotfish.evaluation.table import result_table


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure. Left alone, it measures the embedded guide on the embedded hosts."""

    guide: str = "tiny"
    """Guide: tiny (or tiny-16, tiny-8, tiny-4, with as many steps), or a folder or hub id."""
    hosts: tuple[str, ...] = tuple(bundled.MODELS)
    """Pipelines, the base first: base, fluent, twemoji, emojione, or folders or hub ids."""
    pictures: tuple[str, ...] = ()
    """Folders of real pictures (metadata.jsonl), one for each host that is not bundled."""
    prompts: str | None = None
    """Text file of what is drawn; the judge must find each among all of them. Left out: the
    embedded captions."""
    held_out_prompts: str | None = None
    """Text file of prompts for the guidance error. Left out: the embedded ones."""
    judge: str | None = None
    """Folder of a CLIP that judges. Left out: the embedded judge."""
    samples: int = 1000
    """Pictures for each host and way of guidance."""
    seed: int = 0
    guidance_scale: float = 4.0
    num_inference_steps: int = 25
    batch_size: int = 32
    rounds: int = 15
    """Rounds of the side-by-side timing."""
    inception_weights: str | None = None
    """File of Inception weights: adds FID."""
    clip: str | None = None
    """Folder of a CLIP: adds CLIP score."""
    output: str = "runs/evaluation.json"
    """JSON file of the result. Until all is measured, the finished hosts are kept beside it, and
    the same command goes on from there."""
    grid: str | None = None
    """PNG file: without guidance, CFG and guided, side by side on every host."""


def choose_hosts(names: Sequence[str], pictures: Sequence[str]) -> dict[str, Host]:
    """Hosts by name; pictures go to those that are not embedded, in order.

    Raises:
        ValueError: more folders than such hosts, or two hosts of one name.
    """
    folders, hosts = list(pictures), dict[str, Host]()
    for name in names:
        called = name if name in bundled.MODELS else Path(name).name
        if called in hosts:
            raise ValueError(f"two hosts are called {called}; rename one of the folders")
        if name in bundled.MODELS:
            pictures_folder: Path | None = bundled.images(name)
        else:
            pictures_folder = Path(folders.pop(0)) if folders else None
        hosts[called] = Host(partial(measured, name), pictures_folder)
    if folders:
        raise ValueError(f"--pictures {folders[0]} belongs to no host")
    return hosts


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        EvaluateConfig, args=list(arguments), prog="pilotfish evaluate", use_underscores=True
    )
    names = load_prompts(config.prompts) if config.prompts else bundled.prompts("captions")
    held_out = (
        load_prompts(config.held_out_prompts)
        if config.held_out_prompts
        else bundled.prompts("held_out")
    )
    hosts, chosen = choose_hosts(config.hosts, config.pictures), guide(config.guide)
    unfinished = Path(f"{config.output}.unfinished")
    with shown() as progress:
        result = evaluate(
            hosts, chosen,
            guide_name=config.guide, command=shlex.join(["pilotfish", "evaluate", *arguments]),
            prompts=names, names=names, held_out=held_out, judge=judge(config.judge, config.hosts),
            samples=config.samples,
            seed=config.seed, guidance_scale=config.guidance_scale, rounds=config.rounds,
            num_inference_steps=config.num_inference_steps, batch_size=config.batch_size,
            inception_weights=config.inception_weights, clip=config.clip,
            unfinished=unfinished, progress=progress,
        )  # fmt: skip
    if is_main():
        result.save(config.output)
        unfinished.unlink(missing_ok=True)
        Console().print(result_table(result))
        print(f"saved {config.output}")
    if config.grid:
        rows = names[:8] if config.prompts else bundled.GRID_PROMPTS
        with shown() as progress:
            drawn = draw_hosts(
                hosts, chosen, rows, progress, seed=config.seed,
                guidance_scale=config.guidance_scale,
                num_inference_steps=config.num_inference_steps,
            )  # fmt: skip
        if is_main():
            Path(config.grid).parent.mkdir(parents=True, exist_ok=True)
            wide_grid(rows, drawn).save(config.grid)
            print(f"saved {config.grid}")
