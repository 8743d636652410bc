"""The two stages, each from its settings to the guide that it makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pilotfish import bundled
from pilotfish.guides import Guide
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig, differing
from pilotfish.training.guidance_stage import GuidanceDistillation
from pilotfish.training.kinds import asking_for, new_guide
from pilotfish.training.material import Material
from pilotfish.training.step_stage import StepDistillation


def distill(config: DistillConfig) -> Guide:
    """Stage 1: train a guide as ``config`` says; it is in ``output_dir/guide`` afterwards.

    Raises:
        ConfigError: the guide to begin with is not of the kind, or has not the settings, that
            are asked for (what is left at the default is not), or is of another denoiser.
        GuideError: it cannot be read.
    """
    found = bundled.open_guide(config.begin_with) if config.begin_with else None
    if found is not None:
        config = asking_for(found, config)
    material = Material.of(config, config.pictures)
    guide = new_guide(config, material)
    if found is not None:
        if differs := differing(guide.settings(), found.settings()):
            raise ConfigError(f"{config.begin_with} cannot be trained further so: {differs}")
        guide.load_state_dict(found.state_dict())
    return GuidanceDistillation(config, material, guide).run()


def distill_steps(config: StepsConfig, teacher: Guide) -> dict[int, Guide]:
    """Stage 2, all rounds; each one's guide is in ``output_dir/steps-<n>/guide`` afterwards.

    A round that is finished is not done again with ``resume``.

    Args:
        teacher: the guide to begin with, from stage 1.

    Returns:
        The guides by their number of steps.

    Raises:
        ConfigError: the folder holds an earlier run, and nothing was said of resuming; or a
            checkpoint was named, where every round has its own.
    """
    if config.resume not in (None, "latest"):
        raise ConfigError(f"rounds resume from latest, each from its own, not {config.resume}")
    folders = {n: Path(config.output_dir) / f"steps-{n}" for n in config.steps}
    if config.resume is None and any(folder.exists() for folder in folders.values()):
        raise ConfigError(
            f"{config.output_dir} holds rounds of an earlier run; --resume latest goes on with "
            "it, another --output_dir keeps it"
        )
    material, made = Material.of(config), {}
    for steps, folder in folders.items():
        if (folder / "guide").is_dir():
            student = Guide.from_pretrained(folder / "guide")
        else:
            settings = replace(config, output_dir=str(folder))
            student = StepDistillation(settings, material, teacher, steps).run()
        made[steps] = teacher = student
    return made
