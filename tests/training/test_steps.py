"""Stage 2: one step where the teacher takes two."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from pilotfish.conditioning import NULL
from pilotfish.guidance import classifier_free_guidance
from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideError
from pilotfish.noise import NoisePath, sampling_timesteps
from pilotfish.teacher import checksum
from pilotfish.training.config import ConfigError, StepsConfig
from pilotfish.training.material import Material
from pilotfish.training.pool import Pool
from pilotfish.training.step_stage import StepDistillation
from pilotfish.training.step_states import HalvedTrajectories

PROMPTS = ["a cat", "cat", "dog", "red cat", "a", "tac"]
SHAPE = (4, 8, 8)


@pytest.fixture
def config(tmp_path: Path) -> StepsConfig:
    return StepsConfig(
        output_dir=str(tmp_path / "run"), train_batch_size=4, max_train_steps=6, pool=8,
        replay_capacity=8, checkpointing_steps=2, checkpoints_total_limit=None,
        validation_steps=6, lr_warmup_steps=1, report_to="none",
    )  # fmt: skip


@pytest.fixture
def material(make_pipe: Callable[[str], Any]) -> Callable[[str], Material]:
    return lambda prediction: Material(make_pipe(prediction), PROMPTS, ["tca", "act"])


@pytest.fixture
def teacher(make_unet: Callable[..., Any], randomise: Any) -> Callable[[str], Guide]:
    return lambda prediction: randomise(
        TinyGuide.for_denoiser(make_unet(), prediction, rank=4, condition=4)
    )


def train(config: StepsConfig, material: Material, teacher: Guide, steps: int = 2) -> Guide:
    return StepDistillation(config, material, teacher, steps, notice=lambda line: None).run()


def same(one: Guide, two: Guide) -> bool:
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def hooks_of(module: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def guided(
    z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor, negative: torch.Tensor,
    w: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    tone = (prompt - 0.5 * negative + 1).reshape(-1, 1, 1, 1) * 0.01 + t.reshape(-1, 1, 1, 1) * 1e-4
    return 0.9 * z + w.reshape(-1, 1, 1, 1) * tone


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_the_goal_is_where_two_steps_lead(schedule: NoisePath, own: float) -> None:
    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    pool = Pool(5, SHAPE, (1.5, 6.0), size=12, steps=(4, 4), train_timesteps=1000,
                generator=seeded(0), student_share=own, negative_share=0.5)  # fmt: skip
    source = HalvedTrajectories(guided, schedule, pool, lambda z, *_: torch.zeros_like(z))
    before, slots = pool.latents.clone(), torch.randperm(12, generator=seeded(1))[:6]
    states = source.draw(6, seeded(1))
    fine = [t.expand(6) for t in sampling_timesteps(8)]
    z, prompt, w = before[slots], states.prompt, states.guidance_scale
    texts = prompt, states.negative
    assert torch.equal(states.latents, z)
    halfway = schedule.ddim_step(z, guided(z, fine[0], *texts, w), fine[0], fine[1])
    goal = schedule.ddim_step(halfway, guided(halfway, fine[1], *texts, w), fine[1], fine[2])
    assert torch.equal(states.timestep, fine[0])
    assert torch.equal(states.untrained, guided(z, fine[0], *texts, w))
    reached = schedule.ddim_step(z, states.target(w), fine[0], fine[2])
    torch.testing.assert_close(reached, goal, atol=1e-4, rtol=1e-4)
    led = schedule.ddim_step(z, torch.zeros_like(z), fine[0], fine[2]) if own else goal
    torch.testing.assert_close(pool.latents[slots], led, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("by", ["guide", "cfg"])
def test_resumed_equals_uninterrupted(
    config: StepsConfig, material: Callable[[str], Material], teacher: Callable[[str], Guide],
    tmp_path: Path, by: Any,
) -> None:  # fmt: skip
    config = replace(config, teacher=by)
    whole = train(config, material("epsilon"), teacher("epsilon"))
    path = str(Path(config.output_dir) / "checkpoint-2")
    again = replace(config, output_dir=str(tmp_path / "again"), resume=path)
    assert same(whole, train(again, material("epsilon"), teacher("epsilon")))
    assert not same(whole, teacher("epsilon"))


def test_a_checkpoint_goes_on_under_the_teacher_that_it_had(
    config: StepsConfig, material: Callable[[str], Material], teacher: Callable[[str], Guide]
) -> None:
    config = replace(config, teacher="cfg", overdrive=1.5)
    train(config, material("epsilon"), teacher("epsilon"))
    again = replace(config, resume="latest", overdrive=1.25)
    with pytest.raises(ConfigError, match=r"its overdrive is 1\.5, 1\.25 is asked for"):
        train(again, material("epsilon"), teacher("epsilon"))
    again = replace(config, resume="latest", teacher="guide", overdrive=1.0)
    with pytest.raises(ConfigError, match="its teacher is cfg, guide is asked for"):
        train(again, material("epsilon"), teacher("epsilon"))


@pytest.mark.parametrize("by", ["guide", "cfg"])
def test_it_learns_and_leaves_teacher_and_base_alone(
    config: StepsConfig, material: Callable[[str], Material], teacher: Callable[[str], Guide],
    by: Any,
) -> None:  # fmt: skip
    stuff, guide = material("v_prediction"), teacher("v_prediction")
    config = replace(
        config, teacher=by, max_train_steps=150, validation_steps=75, checkpointing_steps=500
    )
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    hooks, base = hooks_of(stuff.pipe.unet), checksum(stuff.pipe.unet)
    student = train(config, stuff, guide)
    begun, ended = json.loads((Path(config.output_dir) / "history.json").read_text())
    if by == "guide":
        assert ended["latent_error"] < 0.8
    assert ended["latent_error"] < begun["latent_error"]
    assert all(torch.equal(v, guide.state_dict()[k]) for k, v in before.items())
    assert hooks_of(stuff.pipe.unet) == hooks
    assert checksum(stuff.pipe.unet) == base
    assert student.timesteps == tuple(sampling_timesteps(2)[:-1].tolist())


def test_the_guide_knows_its_steps_and_says_so(
    config: StepsConfig, material: Callable[[str], Material], teacher: Callable[[str], Guide],
    draw: Callable[..., torch.Tensor], recwarn: pytest.WarningsRecorder,
) -> None:  # fmt: skip
    stuff = material("epsilon")
    train(config, stuff, teacher("epsilon"))
    student = Guide.from_pretrained(Path(config.output_dir) / "guide")
    pipe = stuff.pipe
    scheduler = type(pipe.scheduler)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with student.attached(pipe):
        recwarn.clear()
        draw(pipe, num_inference_steps=2)
        assert not [w for w in recwarn if "distilled" in str(w.message)]
        for steps in (1, 5):
            with pytest.warns(UserWarning, match="for 2 DDIM steps at the timesteps 999, 499"):
                draw(pipe, num_inference_steps=steps)
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
        with pytest.warns(UserWarning, match=r"use num_inference_steps=2 .*trailing"):
            draw(pipe, num_inference_steps=2)
        solver = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing"
        )
        pipe.scheduler = solver
        with pytest.warns(UserWarning, match="DPMSolverMultistepScheduler takes 2"):
            draw(pipe, num_inference_steps=2)


def test_a_whole_trajectory_of_the_teacher_is_walked(schedule: NoisePath) -> None:
    """From noise to the end, one step of the student for two of the teacher."""
    generator = torch.Generator().manual_seed(0)
    pool = Pool(5, SHAPE, (3.0, 3.0), size=1, steps=(3, 3), train_timesteps=1000,
                generator=generator)  # fmt: skip
    source = HalvedTrajectories(guided, schedule, pool)
    z, w = pool.latents.clone(), pool.scale.clone()
    texts = pool.prompt.clone(), pool.negative.clone()
    states = [source.draw(1, generator) for _ in range(3)]
    for t, to in pairwise(sampling_timesteps(6)):
        z = schedule.ddim_step(z, guided(z, t.expand(1), *texts, w), t.expand(1), to.expand(1))
    last = states[-1]
    end = torch.full((1,), -1)
    reached = schedule.ddim_step(last.latents, last.target(w), last.timestep, end)
    torch.testing.assert_close(reached, z, atol=1e-4, rtol=1e-4)


def test_a_teacher_of_other_steps_is_refused(
    config: StepsConfig, material: Callable[[str], Material], teacher: Callable[[str], Guide]
) -> None:
    guide = teacher("epsilon")
    guide.register_to_config(timesteps=[999, 749, 499, 249])
    with pytest.raises(ConfigError, match="takes 4 steps; a student of 4 needs a teacher of 8"):
        StepDistillation(config, material("epsilon"), guide, 4)


@pytest.mark.parametrize("overdrive", [1.0, 1.5])
def test_cfg_teaches_a_guide_of_any_steps(
    overdrive: float, config: StepsConfig, material: Callable[[str], Material],
    teacher: Callable[[str], Guide],
) -> None:  # fmt: skip
    """What is taught then is equation (1), whatever the guide says."""
    guide, stuff = teacher("epsilon"), material("epsilon")
    guide.register_to_config(timesteps=[999, 749, 499, 249])
    stage = StepDistillation(replace(config, teacher="cfg", overdrive=overdrive), stuff, guide, 4)
    z, t, w = torch.randn(2, *SHAPE), torch.tensor([999, 499]), torch.tensor([2.0, 5.5])
    prompt, negative = torch.tensor([0, 3]), torch.tensor([NULL, 2])
    said = stuff.teacher()(z, t, prompt, negative)
    taught = stage.teach(z, t, prompt, negative, w)
    torch.testing.assert_close(taught, classifier_free_guidance(*said, 1 + overdrive * (w - 1)))
    assert not torch.allclose(taught, stage.own_prediction(z, t, prompt, negative, w))


def test_a_teacher_for_another_denoiser_is_refused(
    config: StepsConfig, material: Callable[[str], Material], teacher: Callable[[str], Guide]
) -> None:
    with pytest.raises(GuideError, match="prediction_type"):
        StepDistillation(config, material("v_prediction"), teacher("epsilon"), 2)


@pytest.mark.parametrize("steps", [(), (8, 5), (0,), (4, 8)])
def test_rounds_that_do_not_halve_are_refused(config: StepsConfig, steps: Any) -> None:
    with pytest.raises(ConfigError, match="each half of the one before"):
        replace(config, steps=steps)
