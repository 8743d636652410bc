"""``pilotfish compare``: all methods under one budget and one measurement.

``--frontier`` and ``--guidances`` are measurements of their own,
:mod:`baselines.frontier.command` and :mod:`baselines.guidances`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from baselines import guidances
from baselines.comparison.config import ComparisonConfig, titles
from baselines.comparison.report import comparison_table, pareto
from baselines.comparison.run import Comparison
from baselines.frontier import command as frontier
from pilotfish import bundled
from pilotfish.cli.names import model_sources, open_scorer
from pilotfish.data.prompts import load_prompts
from pilotfish.errors import Interrupted
from pilotfish.evaluation.plots import save
from pilotfish.evaluation.processes import is_main

QUICK: dict[str, Any] = {
    "max_train_steps": 8, "learning_rates": (1.0,), "equal_seconds": False,
    "train_batch_size": 16, "samples": 16, "validation_samples": 8,
    "num_inference_steps": 10, "rounds": 1,
}  # fmt: skip


@dataclass(frozen=True)
class CompareConfig(ComparisonConfig):
    """Train every method with an equal budget on one base, and measure each there and, without
    further training, on every fine-tune. The same command resumes a comparison."""

    models: tuple[str, ...] = tuple(bundled.MODELS)
    """Pipelines, first the base to train on: base, fluent, twemoji, emojione; sd3, sd3-fluent,
    sd3-twemoji, sd3-emojione; or folders or hub ids."""
    reference_images: tuple[str, ...] = ()
    """Folders of real images (metadata.jsonl), one for each model that is not bundled."""
    train_prompts: str | None = None
    """Text file of prompts to train on. Default: the bundled ones."""
    prompts: str | None = None
    """Text file, the prompts of the images; the scorer must find each among all of them. Default:
    the bundled captions."""
    validation_prompts: str | None = None
    """Text file of held-out prompts for the guidance error. Default: the bundled ones."""
    scorer: str | None = None
    """Folder of a CLIP that scores the images. Default: the bundled one."""
    quick: bool = False
    """A few steps and images on the first two models, a test of minutes; its figures mean
    little."""
    output: str = "runs/compare"
    """Folder for the result (compare.json), the plots and the trainings."""


def main(arguments: Sequence[str]) -> None:
    """Run ``pilotfish compare``."""
    if "--frontier" in arguments:
        frontier.main(arguments)
        return
    if "--guidances" in arguments:
        guidances.main(arguments)
        return
    config = tyro.cli(
        CompareConfig, args=list(arguments), prog="pilotfish compare", use_underscores=True,
        description=f"{CompareConfig.__doc__} Methods: {', '.join(titles())}. With --frontier it "
        "measures methods at several numbers of passes, with --guidances guidances beside CFG; see "
        "--frontier --help and --guidances --help.",
    )  # fmt: skip
    if config.quick:
        config = replace(config, models=config.models[:2], **QUICK)
    base, given = config.models[0], config.validation_prompts
    training = {"prompts": config.train_prompts, "validation_prompts": given}
    if base in bundled.BASES or base not in bundled.model_names():
        training["pretrained_model_name_or_path"] = base
    else:
        raise ValueError(f"the first of --models is trained on and must be a base; {base} is not")
    folder = Path(config.output)
    validation_prompts = load_prompts(given) if given else bundled.prompts("held_out")
    comparison = Comparison(
        config, model_sources(config.models, config.reference_images),
        open_scorer(config.scorer, config.models), folder,
        names=load_prompts(config.prompts) if config.prompts else bundled.prompts("captions"),
        validation_prompts=validation_prompts[: config.validation_samples],
        training=training, command=shlex.join(["pilotfish", "compare", *arguments]),
    )  # fmt: skip
    try:
        found = comparison.run()
    except Interrupted as error:
        raise Interrupted("stopped; the same command resumes it") from error
    if not is_main():
        return
    for budget in found.budgets:
        Console(width=160).print(comparison_table(found, budget))
        plot = folder / f"pareto-{budget}.png"
        save(pareto(found, budget), plot)
        print(f"saved {plot}")
    print(f"saved {comparison.file}")
