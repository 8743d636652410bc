"""A short run of stage 1 on seeded components."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pilotfish.training.config import DistillConfig
from pilotfish.training.material import Material
from tests.training.runs import PROMPTS


@pytest.fixture
def config(tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        output_dir=str(tmp_path / "run"), train_batch_size=4, max_train_steps=6, pool=8,
        replay_capacity=8, replay_reuse=2, trajectory_steps_min=2, trajectory_steps_max=4,
        checkpointing_steps=2, checkpoints_total_limit=None, validation_steps=6,
        lr_warmup_steps=1, report_to="none",
    )  # fmt: skip


@pytest.fixture
def material(make_pipe: Callable[[str], Any], tmp_path: Path) -> Callable[[str], Material]:
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i, text in enumerate(PROMPTS):
        Image.new("RGB", (16, 16), (40 * i, 10, 200 - 30 * i)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return lambda prediction: Material(make_pipe(prediction), PROMPTS, ["tca", "act"], folder)
