"""Validation stays in the range and in the memory of the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pilotfish.training.config import DistillConfig, StepsConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.validation import GuidanceValidation, StepValidation
from tests.training.runs import small_guide


@pytest.mark.parametrize(
    ("low", "high", "scales", "shown"),
    [
        (1.0, 8.0, (2, 4, 7), 4), (1.0, 3.0, (2,), 2), (4.5, 8.0, (7,), 7),
        (3.0, 3.0, (3,), 3), (1.0, 1.5, (1.5,), 1.5), (4.5, 6.0, (4.5, 6), 4.5),
    ],
)  # fmt: skip
def test_it_measures_in_the_range_of_training(
    config: DistillConfig, context: Callable[..., TrainingContext], low: float, high: float,
    scales: Any, shown: float, tmp_path: Path,
) -> None:  # fmt: skip
    config = replace(config, guidance_scale_min=low, guidance_scale_max=high)
    given = context()
    validation = GuidanceValidation(config, given, given.teacher())
    row = validation.run(small_guide(given.pipe.unet), 1, tmp_path)
    assert list(row) == ["guidance_error", *(f"guidance_error_{w:g}" for w in scales)]
    assert validation.shown == shown


@pytest.mark.parametrize("stage", [1, 2])
def test_its_batches_are_those_of_the_training(
    config: DistillConfig, steps_config: StepsConfig, context: Callable[..., TrainingContext],
    batches: Any, randomise: Any, stage: int, tmp_path: Path,
) -> None:  # fmt: skip
    rows = []
    for size in (1, 4):
        given = context()
        guide = randomise(small_guide(given.pipe.unet))
        with batches(given.denoiser) as sizes:
            validation: Any
            if stage == 1:
                own = replace(config, train_batch_size=size)
                validation = GuidanceValidation(own, given, given.teacher())
            else:
                given.use_deterministic_scheduler()
                validation = StepValidation(
                    replace(steps_config, train_batch_size=size), given, given.teacher(), None, 2
                )
            rows.append(validation.run(guide, 1, tmp_path))
        assert max(sizes) == 2 * min(size, len(given.validation_prompts))  # CFG's two passes
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
