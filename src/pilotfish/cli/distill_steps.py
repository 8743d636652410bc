"""``pilotfish distill-steps``: stage 2, round after round."""

from __future__ import annotations

from collections.abc import Sequence

from pilotfish.bundled import guide_of, open_guide
from pilotfish.cli.settings import parse
from pilotfish.training.config import StepsConfig
from pilotfish.training.stages import distill_steps


def main(arguments: Sequence[str]) -> None:
    """The command."""
    config = parse(
        arguments, StepsConfig, "distill-steps",
        "Halve the sampling steps of a guided pipeline, round after round. ",
    )  # fmt: skip
    base = config.pretrained_model_name_or_path or "base"
    distill_steps(config, open_guide(config.guide or guide_of(base)))
