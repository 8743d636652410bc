"""Training on pipelines of videos: their frames, precision and previews."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
from pilotfish.training.context import TrainingContext
from tests.pipelines.pipelines import build
from tests.training.runs import PROMPTS, VALIDATION, same, train, train_steps

VIDEO: dict[str, Any] = {"num_frames": 5, "resolutions": ("32x16",)}


def context(name: str) -> TrainingContext:
    pipe = build(name, alone=True).pipe
    if name == "LTX":  # as it comes: the times depend on the size
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, shift_terminal=0.1, max_image_seq_len=1024
        )
    return TrainingContext(pipe, PROMPTS, VALIDATION)


@pytest.mark.parametrize("name", ["Wan", "LTX"])
def test_a_video_is_trained_in_half_precision_and_resumes(
    name: str, config: DistillConfig, tmp_path: Path
) -> None:
    config = replace(
        config, base_dtype="bf16", mixed_precision="bf16", training_samples="tracking", **VIDEO
    )  # fmt: skip
    given = context(name)
    whole = train(config, given)
    assert whole.dtype == torch.float32
    assert {p.dtype for p in given.denoiser.parameters()} == {torch.bfloat16}
    side = given.backbone.vae_factor(given.pipe)
    assert given.latent_shape == (4, 2, 16 // side, 32 // side)
    # two prompts: without guidance, CFG, guided; of each the middle frame
    assert Image.open(Path(config.output) / "validation" / "step-4.png").size == (3 * 32, 2 * 16)
    again = replace(config, output=str(tmp_path / "again"))
    resumed = replace(again, resume_from_checkpoint=str(Path(config.output) / "checkpoint-2"))
    assert same(whole, train(resumed, context(name)))
    with pytest.raises(ConfigError, match="num_frames is 5 in the checkpoint, 9 in the conf"):
        train(replace(config, num_frames=9, resume_from_checkpoint="latest"), context(name))


def test_fewer_steps_are_distilled_of_videos(
    config: DistillConfig, steps_config: StepsConfig
) -> None:
    """LTX-Video's times depend on the number of latents."""
    given = context("LTX")
    first = train(replace(config, max_train_steps=1, **VIDEO), given)
    steps = replace(steps_config, output=f"{config.output}-steps", max_train_steps=1, **VIDEO)
    few = train_steps(steps, given, first, 4).times
    more = replace(steps, num_frames=9, output=f"{config.output}-more")
    longer = train_steps(more, given, first, 4).times
    assert few is not None
    assert longer is not None
    assert longer[1] > few[1]


@pytest.mark.parametrize(
    ("name", "frames", "words"),
    [
        ("Wan", 6, "num_frames of a WanPipeline must be 1 more than a multiple of 4, such as 5"),
        ("SD", 5, "num_frames is for videos, and a StableDiffusionPipeline makes images"),
    ],
)
def test_frames_that_a_base_does_not_take_are_refused(name: str, frames: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        context(name).use_resolutions((), frames)
