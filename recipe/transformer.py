"""Stage ``transformer``: what the guide of the Stable Diffusion 3 keeps, in one file.

It measures nothing itself. It takes ``results/sd3/``, which these commands write (in full in
docs/recipe.md), and writes ``results/transformer.json``:

- ``frontier.json``: ``pilotfish compare --frontier --base sd3``;
- ``guide.json``: ``pilotfish evaluate --refresh 0``, guidance error, its cosine and the cost;
- ``negative-K.json``: ``pilotfish evaluate --negative_prompts --refresh K``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from baselines.frontier.results import FrontierResult
from pilotfish.evaluation.results import Cost, Interval, NegativeResult, Result, Saved
from pilotfish.guidance_error import GuidanceError

GUIDE = "sd3-tiny"
REFRESHES = (0, 3)
"""Steps with both passes with which negative prompts are measured."""


@dataclass(frozen=True)
class TransformerModel:
    """One model. All but guidance error and cosine are by the number of passes.

    Attributes:
        gain_kept: share of CFG's gain in top-1 retrieval accuracy over no guidance.
        interval: its 95 % interval over the choice of prompts.
        latent_mse_ratio: MSE(guided, cfg) / MSE(none, cfg) of final latents.
        guidance_error: of one pass in every step.
        cosine: of what the guide and what CFG add, there.
        negative_ratio: the guidance error with negative prompts over that with the null prompt.
        few_steps: of the guides for few steps, top-1 relative to that of CFG with the reference
            steps of the frontier.
    """

    gain_kept: dict[str, float]
    interval: dict[str, Interval]
    latent_mse_ratio: dict[str, float]
    guidance_error: GuidanceError
    cosine: float
    negative_ratio: dict[str, float]
    few_steps: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TransformerRun:
    """The commands of the parts, their machines and library versions, and the steps of CFG to which
    guides for few steps are compared."""

    commands: list[str]
    machines: list[str]
    versions: dict[str, str]
    seed: int
    reference_steps: int


@dataclass(frozen=True)
class TransformerResult(Saved):
    """The models, and the cost on the base."""

    run: TransformerRun
    models: dict[str, TransformerModel]
    cost: Cost


def compose(parts: Path) -> TransformerResult:
    """The result of the files in a folder.

    Raises:
        ResultError: a file is missing or no such result.
    """
    frontier = FrontierResult.load(parts / "frontier.json")
    guide = Result.load(parts / "guide.json")
    steps = guide.run.num_inference_steps
    negatives = {
        str(steps + k): NegativeResult.load(parts / f"negative-{k}.json") for k in REFRESHES
    }
    models = {}
    for name, model in guide.models.items():
        kept = {
            f"{entry.passes:g}": entry
            for entry in frontier.models[name]
            if entry.method == GUIDE and entry.steps == steps and not entry.setting
        }
        most = frontier.run.reference_steps
        cfg = frontier.find(name, ("cfg", str(most), "", most))
        few = {
            f"{entry.passes:g}": entry.top1 / cfg.top1
            for entry in frontier.models[name]
            if cfg and entry.method.startswith(f"{GUIDE}-")
        }
        models[name] = TransformerModel(
            {passes: entry.gain_kept for passes, entry in kept.items()},
            {passes: Interval(*entry.interval) for passes, entry in kept.items()},
            {passes: entry.latent_mse_ratio for passes, entry in kept.items()},
            model.guidance_error, model.guidance_error.cosine,
            {passes: found.models[name].ratio for passes, found in negatives.items()},
            dict(sorted(few.items(), key=lambda item: float(item[0]))),
        )  # fmt: skip
    runs = [guide.run, *(found.run for found in negatives.values())]
    run = TransformerRun(
        [*frontier.commands, *(r.command for r in runs)],
        list(dict.fromkeys([*frontier.machines, *(r.machine for r in runs)])),
        guide.run.versions, guide.run.seed, frontier.run.reference_steps,
    )  # fmt: skip
    return TransformerResult(run, models, guide.cost)
