"""``pilotfish sweep``: what CFG alone does for a pipeline, by guidance scale."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from pilotfish import bundled
from pilotfish.cli.evaluate import choose_hosts
from pilotfish.cli.names import judge
from pilotfish.cli.progress import shown
from pilotfish.data.prompts import load_prompts
from pilotfish.evaluation.machine import machine, versions
from pilotfish.evaluation.plots import save, sweep_curve
from pilotfish.evaluation.spread import is_main
from pilotfish.evaluation.sweep import SWEEP, sweep
from pilotfish.evaluation.table import score_cells


@dataclass(frozen=True)
class SweepConfig:
    """What to draw with CFG at which scales; no guide takes part."""

    hosts: tuple[str, ...] = ("base",)
    """Pipelines: base, fluent, twemoji, emojione, or folders or hub ids."""
    pictures: tuple[str, ...] = ()
    """Folders of real pictures, one for each host that is not bundled."""
    prompts: str | None = None
    """Text file, one prompt a line. Left out: the embedded captions."""
    judge: str | None = None
    """Folder of a CLIP that judges. Left out: the embedded judge."""
    guidance_scales: tuple[float, ...] = SWEEP
    samples: int = 1000
    seed: int = 0
    num_inference_steps: int = 25
    batch_size: int = 32
    output: str = "runs/sweep.json"
    """JSON file of the result; plots go beside it."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(
        SweepConfig, args=list(arguments), prog="pilotfish sweep", use_underscores=True
    )
    names = load_prompts(config.prompts) if config.prompts else bundled.prompts("captions")
    found, chosen = {}, judge(config.judge, config.hosts)
    for name, host in choose_hosts(config.hosts, config.pictures).items():
        with shown() as progress:
            found[name] = sweep(
                host.load(), prompts=names, names=names, pictures_folder=host.pictures,
                judge=chosen, samples=config.samples, seed=config.seed,
                batch_size=config.batch_size,
                guidance_scales=config.guidance_scales, progress=progress,
                num_inference_steps=config.num_inference_steps,
            )  # fmt: skip
        if not is_main():
            continue
        table = Table("w", "top-1", "top-5", "cosine", "fd_judge", title=f"CFG on {name}")
        for w, scores in found[name].items():
            table.add_row(w, *score_cells(scores))
        Console().print(table)
        path = Path(config.output)
        plot = path.with_name(f"{path.stem}-{name}.png")
        save(sweep_curve(name, found[name]), plot)
        print(f"saved {plot}")
    if not is_main():
        return
    run = {
        "command": shlex.join(["pilotfish", "sweep", *arguments]), "seed": config.seed,
        "samples": config.samples, "num_inference_steps": config.num_inference_steps,
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    rows = {name: {w: asdict(s) for w, s in by.items()} for name, by in found.items()}
    path = Path(config.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"hosts": rows, "run": run}, indent=2) + "\n")
    print(f"saved {path}")
