"""Stage 2: one step where the teacher takes two."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from pilotfish.conditioning import NULL
from pilotfish.guidance import classifier_free_guidance
from pilotfish.guides import Guide
from pilotfish.interface import GuideError
from pilotfish.teacher import checksum
from pilotfish.training.config import ConfigError, DistillConfig, StepsConfig
from pilotfish.training.context import TrainingContext
from pilotfish.training.samples import StepSamples
from pilotfish.training.stages import StepTrainer
from tests.pipelines.pipelines import build, without_bins
from tests.training.runs import PROMPTS, VALIDATION, same, small_guide, train, train_steps

Context = Callable[..., TrainingContext]
Initial = Callable[..., Guide]


@pytest.fixture
def initial(make_unet: Callable[..., Any], randomise: Any) -> Initial:
    return lambda prediction="epsilon": randomise(small_guide(make_unet(), prediction))


def hooks_of(module: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("teacher", ["guide", "cfg"])
def test_it_learns_resumes_and_leaves_teacher_and_base_as_they_were(
    steps_config: StepsConfig, context: Context, initial: Initial, teacher: Any, tmp_path: Path
) -> None:
    config = replace(
        steps_config, teacher=teacher, max_train_steps=40, validation_steps=20,
        checkpointing_steps=20,
    )  # fmt: skip
    given, guide = context("v_prediction"), initial("v_prediction")
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    hooks, base = hooks_of(given.pipe.unet), checksum(given.denoiser)
    student = train_steps(config, given, guide)
    rows = json.loads((Path(config.output) / "history.json").read_text())
    trainer = StepTrainer(config, context("v_prediction"), initial("v_prediction"), 2)
    untrained = trainer.validation().run(initial("v_prediction"), 0, tmp_path)
    assert rows[-1]["latent_error"] < 0.8 * untrained["latent_error"]
    assert all(torch.equal(v, guide.state_dict()[k]) for k, v in before.items())
    assert hooks_of(given.pipe.unet) == hooks
    assert checksum(given.denoiser) == base
    assert student.times == tuple(given.path.grid(2)[:-1].tolist())
    path = str(Path(config.output) / "checkpoint-20")
    again = replace(config, output=str(tmp_path / "again"), resume_from_checkpoint=path)
    assert same(student, train_steps(again, context("v_prediction"), initial("v_prediction")))


@pytest.mark.parametrize(
    "name",
    [
        "SD3",
        "PixArt-Sigma",
        "Sana",
        "Lumina2",
        "AuraFlow",
        "FLUX.2 klein",
        "Chroma",
        "CogView4",
        "Qwen-Image",
        "Z-Image",
        "Wan",
        "LTX",
    ],
)
def test_both_stages_train_every_family(
    name: str, config: DistillConfig, steps_config: StepsConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    without_bins(type(build(name).pipe), monkeypatch)

    def context() -> TrainingContext:
        return TrainingContext(build(name, alone=True).pipe, PROMPTS, VALIDATION)

    config = replace(
        config, training_samples="on_policy", negative_prompt_prob=0.5, learning_rate=1e-4,
        gradient_checkpointing=True,
    )  # fmt: skip
    trained = train(config, context())
    rows = json.loads((Path(config.output) / "history.json").read_text())
    assert 0 < rows[-1]["guidance_error"] < 1.5
    path = str(Path(config.output) / "checkpoint-2")
    resumed = train(
        replace(config, output=str(tmp_path / "again"), resume_from_checkpoint=path), context()
    )
    assert same(trained, resumed)
    with warnings.catch_warnings():  # validation takes the steps that are trained
        warnings.filterwarnings("error", "this guide was distilled")
        steps = replace(steps_config, output=str(tmp_path / "steps"), max_train_steps=1)
        student = train_steps(steps, given := context(), trained)
    assert student.times == tuple(given.path.grid(2)[:-1].tolist())


def test_a_checkpoint_continues_under_its_own_teacher(
    steps_config: StepsConfig, context: Context, initial: Initial
) -> None:
    config = replace(steps_config, teacher="cfg", teacher_scale_multiplier=1.5, max_train_steps=2)
    train_steps(config, context(), initial())
    again = replace(config, resume_from_checkpoint="latest", teacher_scale_multiplier=1.25)
    with pytest.raises(ConfigError, match=r"teacher_scale_multiplier is 1\.5 in the checkpoint, 1"):
        train_steps(again, context(), initial())
    again = replace(again, teacher="guide", teacher_scale_multiplier=1.0)
    with pytest.raises(ConfigError, match="teacher is cfg in the checkpoint, guide in the conf"):
        train_steps(again, context(), initial())


@pytest.mark.parametrize(
    "kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, PNDMScheduler, DDIMScheduler]
)
def test_the_noise_path_is_that_of_the_scheduler_of_stage_2(
    steps_config: StepsConfig, context: Context, initial: Initial, kind: Any
) -> None:
    """The alpha after the last step is DDIM's, whatever scheduler the base comes with."""
    given = context()
    settings = given.pipe.scheduler.config | {"set_alpha_to_one": False}
    given.pipe.scheduler = kind.from_config(settings)
    trainer = StepTrainer(steps_config, given, initial(), 2, log=lambda line: None)
    scheduler = given.pipe.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    path = trainer.source(0, 0, trainer.sizes[0]).path  # type: ignore[attr-defined]
    scheduler.set_timesteps(2)
    z, prediction = torch.randn(2, 1, 4, 8, 8)
    t, end = path.grid(2)[1:].split(1)
    ours = path.step(z, prediction, t, end)
    theirs = scheduler.step(prediction, 499, z).prev_sample
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_the_guide_knows_its_steps_and_says_so(
    steps_config: StepsConfig, context: Context, initial: Initial, draw: Any,
    recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    given = context()
    train_steps(replace(steps_config, max_train_steps=1), given, initial())
    student = Guide.from_pretrained(Path(steps_config.output) / "guide")
    pipe = given.pipe
    scheduler = type(pipe.scheduler)
    with student.attached(pipe):
        recwarn.clear()
        draw(pipe, num_inference_steps=2)
        assert not [w for w in recwarn if "distilled" in str(w.message)]
        for steps in (1, 5):
            with pytest.warns(UserWarning, match="for 2 steps at the times 0.999, 0.499"):
                draw(pipe, num_inference_steps=steps)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        with pytest.warns(UserWarning, match=r"use num_inference_steps=2 .*trailing"):
            draw(pipe, num_inference_steps=2)
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
        with pytest.warns(UserWarning, match="DPMSolverMultistepScheduler takes 2"):
            draw(pipe, num_inference_steps=2)


@pytest.mark.parametrize("multiplier", [1.0, 1.5])
def test_cfg_teaches_a_guide_of_any_steps(
    multiplier: float, steps_config: StepsConfig, context: Context, initial: Initial
) -> None:
    """The target is equation (1), whatever the guide predicts; a guide as teacher needs twice the
    steps."""
    guide, given = initial(), context()
    guide.register_to_config(times=[0.999, 0.749, 0.499, 0.249])
    with pytest.raises(ConfigError, match="takes 4 steps; a student of 4 needs a teacher of 8"):
        StepTrainer(steps_config, given, guide, 4)
    config = replace(steps_config, teacher="cfg", teacher_scale_multiplier=multiplier)
    trainer = StepTrainer(config, given, guide, 4)
    z, t, w = torch.randn(2, 4, 8, 8), torch.tensor([0.999, 0.499]), torch.tensor([2.0, 5.5])
    prompt, negative = torch.tensor([0, 3]), torch.tensor([NULL, 2])
    both = given.teacher()(z, t, prompt, negative)
    taught = trainer.teach(z, t, prompt, negative, w)
    torch.testing.assert_close(taught, classifier_free_guidance(*both, 1 + multiplier * (w - 1)))
    none = torch.zeros(2), *torch.zeros(4, 2, 4, 8, 8), *torch.zeros(2, 2)
    samples = StepSamples(z, t, w, prompt, negative, *none, z, z, torch.zeros(2, dtype=torch.bool))
    assert not torch.allclose(taught, trainer.student_prediction(samples))


def test_a_teacher_for_another_denoiser_is_refused(
    steps_config: StepsConfig, context: Context, initial: Initial
) -> None:
    with pytest.raises(GuideError, match="prediction_type"):
        StepTrainer(steps_config, context("v_prediction"), initial("epsilon"), 2)
