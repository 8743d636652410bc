"""``pilotfish distill``: stage 1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from pilotfish.distill.config import ConfigError, DistillConfig
from pilotfish.distill.loop import Distillation
from pilotfish.distill.material import Material
from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide


def parse(arguments: Sequence[str]) -> DistillConfig:
    """Flags, over the values of a file given by ``--config``, over the defaults."""
    arguments, default = list(arguments), None
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise ConfigError("--config needs the path of a JSON file")
        default = DistillConfig.load(Path(arguments[place + 1]))
        del arguments[place : place + 2]
    description = (
        "Train a guide against a frozen base. --config FILE reads settings from JSON "
        "(such as a run's own config.json); flags go over it."
    )
    config: DistillConfig = tyro.cli(
        DistillConfig, args=arguments, default=default, prog="pilotfish distill",
        description=description, use_underscores=True,
    )  # type: ignore[assignment]  # fmt: skip
    return config


def new_guide(config: DistillConfig, material: Material) -> Guide:
    """The guide that a configuration asks for, fresh."""
    torch.manual_seed(config.seed)
    unet, prediction = material.pipe.unet, material.schedule.prediction_type
    scales = (config.guidance_scale_min, config.guidance_scale_max)
    if config.guide == "full":
        return FullGuide.for_denoiser(unet, prediction, guidance_scale_range=scales)
    if config.guide == "external":
        return ExternalGuide.for_denoiser(
            unet, prediction, guidance_scale_range=scales, reads=config.reads
        )
    return TinyGuide.for_denoiser(
        unet, prediction, guidance_scale_range=scales,
        push=config.push, rank=config.rank, head=config.head,
    )  # fmt: skip


def distill(config: DistillConfig) -> Guide:
    """Train a guide as ``config`` says; it is in ``output_dir/guide`` afterwards."""
    material = Material.of(config)
    return Distillation(config, material, new_guide(config, material)).run()


def main(arguments: Sequence[str]) -> None:
    """The command."""
    distill(parse(arguments))
