"""``pilotfish demo``: the whole story in minutes, on the embedded model."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from pilotfish import bundled
from pilotfish.cli.progress import progress_bars
from pilotfish.evaluation import plots, report
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.grids import draw_models, model_grid, wide_grid
from pilotfish.evaluation.images import ImageBatch, bundled_models
from pilotfish.evaluation.results import Result
from pilotfish.evaluation.run import evaluate
from pilotfish.evaluation.tables import result_table
from pilotfish.guides import Guide
from pilotfish.training.config import DistillConfig
from pilotfish.training.stages import distill

TRAINING = "demo-training"
"""A folder that is the demo's alone: it is deleted when another demo begins, and --output_dir may
hold trainings of other commands."""


@dataclass(frozen=True)
class DemoConfig:
    """Distil a guide from nothing for a few minutes, measure it and the shipped one on the base
    and on three fine-tunes that neither has seen, and write a report with pictures."""

    max_train_steps: int = 150
    samples: int = 48
    """Pictures for each host and way of guidance."""
    guidance_scale: float = 4.0
    num_inference_steps: int = 25
    seed: int = 0
    resume: str | None = None
    """``latest``: go on with a distillation that was interrupted."""
    output_dir: str = "runs/demo"


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = tyro.cli(DemoConfig, args=list(arguments), prog="pilotfish demo", use_underscores=True)
    folder, command = Path(config.output_dir), shlex.join(["pilotfish", "demo", *arguments])
    training = folder / TRAINING
    if config.resume is None and training.exists():  # every demo begins anew
        shutil.rmtree(training)
    fresh = distill(
        DistillConfig(
            output_dir=str(training), max_train_steps=config.max_train_steps,
            validation_steps=50, checkpointing_steps=100, seed=config.seed, resume=config.resume,
            # a short run sees few states anyway, and should not wait for thousands
            pool=512, replay_capacity=2048, lr_warmup_steps=30,
        )
    )  # fmt: skip
    models, scorer, names = bundled_models(), Scorer.bundled(), bundled.prompts("captions")
    sampling: dict[str, Any] = {
        "guidance_scale": config.guidance_scale,
        "num_inference_steps": config.num_inference_steps,
        "seed": config.seed,
    }
    results: dict[str, Result] = {}
    cache: dict[str, list[dict[str, ImageBatch]]] = {}
    guides: dict[str, Guide] = {"shipped": bundled.load_guide(), "fresh": fresh}
    for label, guide in guides.items():
        with progress_bars() as progress:
            results[label] = evaluate(
                models, guide, guide_name=f"tiny, {label}", command=command, prompts=names,
                names=names, validation_prompts=bundled.prompts("held_out")[:16], scorer=scorer,
                samples=config.samples, rounds=7, unfinished=folder / f"{label}.unfinished",
                cache=cache, progress=progress, **sampling,
            )  # fmt: skip
        results[label].save(folder / f"{label}.json")
        (folder / f"{label}.unfinished").unlink(missing_ok=True)
    with progress_bars() as progress:
        drawn = draw_models(models, guides["shipped"], bundled.GRID_PROMPTS, progress, **sampling)
    grids = {"Base and fine-tunes, the shipped guide": wide_grid(bundled.GRID_PROMPTS, drawn)}
    grids["Base, the guide distilled just now"] = model_grid(
        bundled.GRID_PROMPTS,
        draw_models({"base": models["base"]}, fresh, bundled.GRID_PROMPTS, **sampling)["base"],
    )
    for name, image in zip(("grid", "grid-fresh"), grids.values(), strict=True):
        image.save(folder / f"{name}.png")
    history = json.loads((training / "history.json").read_text())
    for name, figure in (
        ("guidance-error-by-w", plots.guidance_error_over_scale(results["shipped"])),
        ("guidance-error-by-time", plots.guidance_error_over_time(results["shipped"])),
        ("training", plots.training_curve(history)),
        ("cost", plots.cost_bars(results["shipped"].cost)),
    ):
        plots.save(figure, folder / f"{name}.png")
    report.write(
        folder / "report.html", results["shipped"], fresh=results["fresh"], grids=grids,
        training=history,
    )  # fmt: skip
    Console().print(result_table(results["shipped"]))
    print(f"open {folder / 'report.html'}")
