"""``pilotfish evaluate``: a guide on a base and its fine-tunes.

``--protocol`` is a measurement of its own, :mod:`pilotfish.cli.protocol`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from pilotfish import bundled
from pilotfish.cli import protocol
from pilotfish.cli.names import (
    Dtype,
    model_sources,
    named_methods,
    open_guide,
    open_scorer,
    split_name,
)
from pilotfish.cli.progress import progress_bars
from pilotfish.data.prompts import load_prompts
from pilotfish.evaluation import plots, tables
from pilotfish.evaluation.curves import score_guidance_scales, score_steps
from pilotfish.evaluation.grids import draw_models, sheet
from pilotfish.evaluation.images import TITLES, guidance_modes
from pilotfish.evaluation.negatives import evaluate_negatives
from pilotfish.evaluation.processes import is_main
from pilotfish.evaluation.results import CurveResult, NegativeResult, Result
from pilotfish.evaluation.run import evaluate
from pilotfish.guidances import CFG, Guidance
from pilotfish.pipelines import Reference, Refreshed

Measured = Result | CurveResult | NegativeResult


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a guide against each model's own CFG: guidance error, scores, agreement, cost. Or,
    with --steps, --guidance_scales or --negative_prompts, one of these alone. Without any option
    the bundled guide tiny is measured on its base and three fine-tunes. The same command resumes
    an evaluation that was stopped. With --protocol (coco2017, drawbench, parti or
    negative-prompts) it runs a public benchmark on weights of your own; see --protocol coco2017
    --help."""

    guide: tuple[str, ...] = ()
    """Guide: tiny, or sd3-tiny for sd3; tiny-16, tiny-8, tiny-4, sd3-tiny-16, sd3-tiny-8 or
    sd3-tiny-4, with as many steps; or a folder or hub id. Left out: that of the bundled base.
    With --steps and --guidance_scales several, also guidance-interval and adaptive-guidance in a
    clone; or none, where a model of your own comes first and it is left out. NAME=GUIDE gives it a
    name in the result; guides for different numbers of steps that have one name make one line."""
    models: tuple[str, ...] = tuple(bundled.MODELS)
    """Pipelines, the base first: base, fluent, twemoji, emojione, step-lora, high-contrast,
    monotone, streamline; sd3, sd3-fluent, sd3-twemoji, sd3-emojione; or folders or hub ids."""
    reference_images: tuple[str, ...] = ()
    """Folders of real images (metadata.jsonl), one for each model that is not bundled."""
    prompts: str | None = None
    """Text file, the prompts of the images; the scorer must find each among all of them. Left
    out: the bundled captions."""
    validation_prompts: str | None = None
    """Text file of held-out prompts, for the guidance error and for --negative_prompts. Left
    out: the bundled ones."""
    scorer: str | None = None
    """Folder of a CLIP that scores the images. Left out: the bundled one."""
    steps: tuple[int, ...] = ()
    """Scores by number of sampling steps, such as 4 8 16, with the
    deterministic scheduler (DDIM or Euler). A guide that was
    distilled to few steps takes its own alone."""
    guidance_scales: tuple[float, ...] = ()
    """Scores by guidance scale, such as 1 2 4 7."""
    teacher: Guidance = CFG
    """With --steps and --guidance_scales, a guidance that is measured as well, with all its passes.
    A guide is always compared with the one that it was taught."""
    negative_prompts: bool = False
    """Agreement with CFG where both have a negative prompt: each held-out prompt has another one
    as its negative prompt."""
    samples: int = 1000
    """Images for each model and guidance mode."""
    seed: int = 0
    """Seed of the first image; each further image has the next one."""
    guidance_scale: float = 4.0
    num_inference_steps: int = 25
    num_frames: int | None = None
    """Frames of a video: 1 more than a multiple of what the pipeline takes for one latent, such as
    49. Left out: the pipeline's own number."""
    refresh: int | None = None
    """How many steps of a guide run both passes. Left out: its own ratio of the steps."""
    batch_size: int = 32
    """Images in one call, in each process."""
    dtype: Dtype = "float32"
    """Precision of the models."""
    variant: str | None = None
    """Variant of the weight files, such as fp16, of models that come in no other."""
    rounds: int = 15
    """Rounds of the side-by-side timing. No effect with --guidance_scales and
    --negative_prompts."""
    inception_weights: str | None = None
    """File of Inception weights: adds FID."""
    clip: str | None = None
    """Folder of a CLIP: adds CLIP score."""
    output: str = "runs/evaluation.json"
    """JSON file of the result; plots go beside it."""
    grid: str | None = None
    """PNG file: without guidance, CFG and guided, side by side on every model."""


def main(arguments: Sequence[str]) -> None:
    """The command."""
    if any(argument.partition("=")[0] == "--protocol" for argument in arguments):
        protocol.main(arguments)
        return
    config = tyro.cli(
        EvaluateConfig, args=list(arguments), prog="pilotfish evaluate", use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )  # fmt: skip
    if not config.guide:
        config = replace(config, guide=_own_guide(config))
    _check(config)
    unfinished = Path(f"{config.output}.unfinished")
    models = model_sources(config.models, config.reference_images, config.dtype, config.variant)
    with progress_bars() as progress:
        found = _measure(
            config, models=models, scorer=open_scorer(config.scorer, config.models),
            command=shlex.join(["pilotfish", "evaluate", *arguments]), seed=config.seed,
            num_frames=config.num_frames, batch_size=config.batch_size, unfinished=unfinished,
            progress=progress,
        )  # fmt: skip
    if is_main():
        found.save(config.output)
        unfinished.unlink(missing_ok=True)
        _show(found, Path(config.output))
        print(f"saved {config.output}")
    if config.grid:
        prompts = bundled.GRID_PROMPTS if config.prompts is None else _prompts(config)[:8]
        guide = open_guide(split_name(config.guide[0])[1])
        modes = guidance_modes(
            Refreshed(guide, config.refresh), config.guidance_scale, Reference(guide.guidance)
        )
        with progress_bars() as progress:
            drawn = draw_models(
                models, {TITLES[mode]: how for mode, how in modes.items()}, prompts,
                progress=progress, seed=config.seed,
                num_inference_steps=config.num_inference_steps, num_frames=config.num_frames,
            )  # fmt: skip
        if is_main():
            Path(config.grid).parent.mkdir(parents=True, exist_ok=True)
            sheet(prompts, drawn).save(config.grid)
            print(f"saved {config.grid}")


def _own_guide(config: EvaluateConfig) -> tuple[str, ...]:
    """That of the first model's base; none where curves of a model of the user's are measured."""
    curve, first = config.steps or config.guidance_scales, config.models[0]
    return () if curve and first not in bundled.model_names() else (bundled.guide_of(first),)


def _check(config: EvaluateConfig) -> None:
    """Refuse options that exclude one another, and files that cannot be written.

    Raises:
        ValueError: naming them.
    """
    given = {
        "--steps": config.steps, "--guidance_scales": config.guidance_scales,
        "--negative_prompts": config.negative_prompts,
    }  # fmt: skip
    chosen = [flag for flag, value in given.items() if value]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} cannot be combined; run evaluate for each")
    curve = bool(config.steps or config.guidance_scales)
    if len(config.guide) != 1 and not curve:
        raise ValueError(
            f"{len(config.guide)} guides, but without --steps or --guidance_scales one is measured"
        )
    for flag in ("grid", "clip", "inception_weights"):
        if chosen and getattr(config, flag) is not None:
            raise ValueError(f"--{flag} has no effect with {chosen[0]}")
    for flag in ("output", "grid"):
        path = getattr(config, flag)
        if path is not None and Path(path).is_dir():
            raise ValueError(f"--{flag} {path} is a folder; give the name of a file")


def _measure(config: EvaluateConfig, models: Any, **same: Any) -> Measured:
    if config.steps or config.guidance_scales:
        same |= {
            "names": _prompts(config), "samples": config.samples, "refresh": config.refresh,
        }  # fmt: skip
        methods = named_methods(config.guide)
        if config.teacher != CFG:
            methods.setdefault(config.teacher.guidance, []).append(Reference(config.teacher))
        if config.steps:
            return score_steps(
                models, methods, config.steps, guidance_scale=config.guidance_scale,
                rounds=config.rounds, **same,
            )  # fmt: skip
        return score_guidance_scales(
            models, methods, config.guidance_scales,
            num_inference_steps=config.num_inference_steps, **same,
        )  # fmt: skip
    name, path = split_name(config.guide[0])
    guide = open_guide(path)
    if config.teacher not in (CFG, guide.guidance):
        raise ValueError(
            f"{path} was taught {guide.guidance}, and is compared with that: leave out --guidance "
            f"{config.teacher.guidance}, or measure it with --steps or --guidance_scales"
        )
    held_out = (
        load_prompts(config.validation_prompts)
        if config.validation_prompts
        else bundled.prompts("held_out")
    )
    same |= {
        "guide_name": name if config.guide[0] != path else path,
        "guidance_scale": config.guidance_scale, "num_inference_steps": config.num_inference_steps,
        "refresh": guide.refresh_ratio if config.refresh is None else config.refresh,
    }  # fmt: skip
    if config.negative_prompts:
        return evaluate_negatives(models, guide, held_out, **same)
    names = _prompts(config)
    return evaluate(
        models, guide, prompts=names, names=names, validation_prompts=held_out,
        samples=config.samples, rounds=config.rounds, clip=config.clip,
        inception_weights=config.inception_weights, **same,
    )  # fmt: skip


def _prompts(config: EvaluateConfig) -> list[str]:
    return load_prompts(config.prompts) if config.prompts else bundled.prompts("captions")


def _show(found: Measured, output: Path) -> None:
    """Tables on the terminal, plots beside the file."""
    console = Console(width=120)
    if isinstance(found, Result):
        console.print(tables.result_table(found))
        figures = {"guidance-error": plots.guidance_errors(found)}
    elif isinstance(found, NegativeResult):
        console.print(tables.negatives_table(found))
        figures = {}
    else:
        for model in found.models:
            console.print(tables.curve_table(found, model))
        figures = {model: plots.curve(found, model) for model in found.models}
    for name, figure in figures.items():
        file = output.with_name(f"{output.stem}-{name}.png")
        plots.save(figure, file)
        print(f"saved {file}")
