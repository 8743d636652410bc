"""Short runs of both stages on tiny components."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from pilotfish.training import validation
from pilotfish.training.config import DistillConfig, StepsConfig
from pilotfish.training.context import TrainingContext
from tests.training.runs import PROMPTS, SHORT, VALIDATION


@pytest.fixture(autouse=True)
def _precision() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the first precision
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def _short_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "STEPS", 2)


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        output=str(tmp_path / "run"), guide={"rank": 4}, trajectory_steps_min=2,
        trajectory_steps_max=4, **SHORT | {"replay_reuse": 2},
    )  # fmt: skip


@pytest.fixture
def steps_config(tmp_path: Path) -> StepsConfig:
    return StepsConfig(output=str(tmp_path / "run"), **SHORT)


@pytest.fixture
def context(make_pipe: Callable[[str], Any], tmp_path: Path) -> Callable[..., TrainingContext]:
    """A function that makes a context of its own; every call stands alone."""
    folder = tmp_path / "images"
    folder.mkdir()
    rows = []
    for i, text in enumerate(PROMPTS):
        Image.new("RGB", (16, 16), (40 * i, 10, 200 - 30 * i)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))

    def make(prediction_type: str = "epsilon") -> TrainingContext:
        return TrainingContext(make_pipe(prediction_type), PROMPTS, VALIDATION, folder)

    return make


@pytest.fixture
def saved_base(
    config: DistillConfig, make_pipe: Callable[[str], Any], tmp_path: Path
) -> DistillConfig:
    """Settings with a base and prompts on the disk, for other processes."""
    make_pipe("epsilon").save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return replace(
        config, pretrained_model_name_or_path=str(tmp_path / "base"),
        prompts=str(tmp_path / "prompts.txt"), replay_reuse=1,
    )  # fmt: skip
