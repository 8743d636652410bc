"""``pilotfish distill-steps``: stage 2, round after round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pilotfish.cli.names import guide
from pilotfish.cli.settings import parse
from pilotfish.distill.config import ConfigError, StepsConfig
from pilotfish.distill.material import Material
from pilotfish.distill.step_stage import StepDistillation
from pilotfish.guides import Guide


def distill_steps(config: StepsConfig) -> dict[int, Guide]:
    """All rounds; each one's guide is in ``output_dir/steps-<n>/guide`` afterwards.

    A round that is finished is not done again with ``resume``.

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
    material, teacher, made = Material.of(config), guide(config.guide), {}
    for steps, folder in folders.items():
        if (folder / "guide").is_dir():
            student = Guide.from_pretrained(folder / "guide")
        else:
            settings = replace(config, output_dir=str(folder))
            student = StepDistillation(settings, material, teacher, steps).run()
        made[steps] = teacher = student
    return made


def main(arguments: Sequence[str]) -> None:
    """The command."""
    distill_steps(
        parse(
            arguments, StepsConfig, "distill-steps",
            "Teach a guide to take one step where it takes two, round after round. ",
        )
    )  # fmt: skip
