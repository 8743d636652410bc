"""Stage ``transformer``: what the guide of the Stable Diffusion 3 keeps, in one file.

It measures nothing itself. It takes ``results/sd3/``, which these commands write (in full in
docs/recipe.md), and writes ``results/transformer.json``:

- ``frontier.json``: ``pilotfish compare --frontier --base sd3``, the gain kept and the cost;
- ``negative-K.json``: ``pilotfish evaluate --negative_prompts --refresh K``, guidance errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from baselines.frontier.results import FrontierEntry, FrontierResult
from pilotfish.evaluation.results import Interval, NegativeResult, Saved
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
    """The commands of the parts, their machines and library versions, the precision, and the steps
    of CFG to which guides for few steps are compared."""

    commands: list[str]
    machines: list[str]
    versions: dict[str, str]
    seed: int
    dtype: str
    reference_steps: int


@dataclass(frozen=True)
class TransformerResult(Saved):
    """The models, and the wall clock on the base: CFG over the guide, by passes and batch size."""

    run: TransformerRun
    models: dict[str, TransformerModel]
    cost: dict[str, dict[str, float]]


def compose(parts: Path) -> TransformerResult:
    """The result of the files in a folder.

    Raises:
        ResultError: a file is missing or no such result.
    """
    frontier = FrontierResult.load(parts / "frontier.json")
    steps = frontier.run.num_inference_steps
    negatives = {
        str(steps + k): NegativeResult.load(parts / f"negative-{k}.json") for k in REFRESHES
    }
    one_pass = negatives[str(steps)].models
    guided = {name: _by_passes(frontier, name) for name in one_pass}
    models = {}
    for name, kept in guided.items():
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
            one_pass[name].null, one_pass[name].null.cosine,
            {passes: found.models[name].ratio for passes, found in negatives.items()},
            dict(sorted(few.items(), key=lambda item: float(item[0]))),
        )  # fmt: skip
    base = next(iter(guided.values()))
    cost = {passes: entry.cfg_over_it for passes, entry in base.items() if entry.has_cost}
    runs = [found.run for found in negatives.values()]
    run = TransformerRun(
        [*frontier.commands, *[frontier.run.cost_command] * bool(cost), *(r.command for r in runs)],
        list(dict.fromkeys([*frontier.machines, *(r.machine for r in runs)])),
        frontier.run.versions, frontier.run.seed, frontier.run.dtype, frontier.run.reference_steps,
    )  # fmt: skip
    return TransformerResult(run, models, cost)


def _by_passes(frontier: FrontierResult, model: str) -> dict[str, FrontierEntry]:
    """The entries of the guide in its default places."""
    return {
        f"{entry.passes:g}": entry
        for entry in frontier.models[model]
        if entry.method == GUIDE and entry.steps == frontier.run.num_inference_steps
        and not entry.setting
    }  # fmt: skip
