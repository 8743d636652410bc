"""Several sizes and aspect ratios in one training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.trainer import Trainer
from tests.pipelines.pipelines import build
from tests.training.runs import PROMPTS, VALIDATION, same, train, train_steps

SIZES = ("16x16", "24x16", "16x32")


def context(name: str) -> TrainingContext:
    return TrainingContext(build(name, alone=True).pipe, PROMPTS, VALIDATION)


@pytest.mark.parametrize(
    "name", ["SD", "SDXL", "SD3", "CogView4", "Qwen-Image", "Z-Image", "Wan", "LTX"]
)
def test_every_batch_draws_a_size_and_a_resumed_run_the_same(
    name: str, config: DistillConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, ...]] = []
    plain = Trainer.predict

    def noted(self: Any, student: Any, samples: Any, w: Any) -> Any:
        drawn.append(tuple(samples.latents.shape[-2:]))
        return plain(self, student, samples, w)

    monkeypatch.setattr(Trainer, "predict", noted)
    config = replace(
        config, resolutions=SIZES, gradient_accumulation_steps=4, train_batch_size=2,
        guidance_scale_max=6.0, num_frames=5 if name in ("Wan", "LTX") else None,
    )  # fmt: skip
    given = context(name)
    whole = train(config, given)
    token = given.backbone.packing * given.backbone.vae_factor(given.pipe)
    first = drawn.copy()
    assert set(first) == {
        (height // token, width // token) for width, height in ((16, 16), (24, 16), (16, 32))
    }
    drawn.clear()
    latest = str(Path(config.output) / "checkpoint-2")
    again = replace(config, output=str(tmp_path / "again"), resume_from_checkpoint=latest)
    assert same(whole, train(again, context(name)))
    assert drawn == first[len(first) // 2 :]
    # a row of three images for each validation prompt, of the first two sizes
    assert Image.open(Path(config.output) / "validation" / "step-4.png").size == (72, 32)
    other = replace(
        again, output=config.output, resume_from_checkpoint="latest", resolutions=SIZES[:2]
    )
    with pytest.raises(ConfigError, match=r"resolutions is \['16x16', '24x16', '16x32'\] in the"):
        train(other, context(name))


def test_a_denoiser_is_told_the_size_of_its_images(config: DistillConfig) -> None:
    given = context("SDXL")
    given.use_resolutions(SIZES)
    told: list[Any] = []
    given.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["added_cond_kwargs"]["time_ids"]),
        with_kwargs=True,
    )
    teacher, text = given.teacher(), given.texts.null
    for size in given.sizes:
        teacher.base(torch.zeros(1, *size.shape), torch.tensor([0.5]), text)
    assert [ids[0].tolist() for ids in told] == [
        [height, width, 0, 0, height, width] for width, height in ((16, 16), (24, 16), (16, 32))
    ]


def test_few_steps_are_distilled_at_every_size(steps_config: StepsConfig) -> None:
    config = replace(steps_config, resolutions=SIZES[:2])
    guide = train_steps(config, context("SD"))
    assert len(guide.times or ()) == 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (("16",), r"resolutions\[0\] .*pattern"),
        (("16x16", "16x16"), "resolutions must differ, not 16x16 16x16"),
        (("18x16",), r"must be multiples of 4 pixels, not 18x16"),
    ],
)
def test_sizes_that_cannot_be_trained_are_named(
    config: DistillConfig, sizes: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(replace(config, resolutions=sizes), context("SD"))
    with pytest.raises(ConfigError, match="resolutions must be empty with --training_samples nois"):
        replace(config, resolutions=SIZES, training_samples="noised")
