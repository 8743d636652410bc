"""Sampling as an iterable, and the teacher's own trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pilotfish.conditioning import NULL, encoded
from pilotfish.guidance import classifier_free_guidance
from pilotfish.guides import Guide
from pilotfish.noise import NoisePath
from pilotfish.pipelines.sampling import cfg_trajectories, decode, sample
from pilotfish.teacher import Teacher

PROMPTS = ["cat", "a dog", "bee"]
CALL: dict[str, Any] = {"seeds": [3, 1, 3], "guidance_scale": 4.0, "num_inference_steps": 2}


def test_one_sample_for_each_prompt_in_order(pipe: Any) -> None:
    made = list(sample(pipe, PROMPTS, **CALL))
    assert [s.prompt for s in made] == PROMPTS
    assert [s.seed for s in made] == CALL["seeds"]
    for one in made:
        assert one.latents.shape == (4, 8, 8)
        assert one.image.shape == (3, 16, 16)
        assert one.image.abs().max() <= 1
        assert not one.image.requires_grad


def test_a_sample_does_not_depend_on_its_batch(pipe: Any) -> None:
    together = list(sample(pipe, PROMPTS, **CALL))
    apart = list(sample(pipe, PROMPTS, batch_size=1, **CALL))
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.image, other.image, atol=1e-4, rtol=1e-4)


def test_the_same_seed_starts_from_the_same_noise_with_and_without_a_guide(
    trained: Guide, pipe: Any
) -> None:
    seen: list[torch.Tensor] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call = {**CALL, "num_inference_steps": 1}
    list(sample(pipe, PROMPTS, **call))
    list(sample(pipe, PROMPTS, guide=trained, **call))
    cfg, guided = seen
    assert torch.equal(cfg.chunk(2)[0], guided)
    assert torch.equal(guided[0], guided[2])
    assert not torch.equal(guided[0], guided[1])


def test_the_guide_is_attached_for_the_length_of_the_call(
    trained: Guide, pipe: Any, batches: Callable[..., Any]
) -> None:
    plain = type(pipe)
    with batches(pipe.unet) as sizes:
        list(sample(pipe, PROMPTS, guide=trained, batch_size=2, **CALL))
    assert sizes == [2, 2, 1, 1]
    assert type(pipe) is plain


def test_between_two_pictures_the_pipeline_is_its_owners(trained: Guide, pipe: Any) -> None:
    plain = type(pipe)
    for _ in sample(pipe, PROMPTS, guide=trained, batch_size=1, **CALL):
        assert type(pipe) is plain


def test_a_fresh_guide_samples_without_guidance(fresh: Guide, pipe: Any) -> None:
    guided = list(sample(pipe, PROMPTS, guide=fresh, **CALL))
    plain = list(sample(pipe, PROMPTS, **{**CALL, "guidance_scale": 1.0}))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(guided, plain, strict=True))


def test_prompts_and_seeds_must_agree_in_number(pipe: Any) -> None:
    with pytest.raises(ValueError, match="3 prompts but 2 seeds"):
        list(sample(pipe, PROMPTS, **{**CALL, "seeds": [0, 1]}))


def test_decoding_is_the_pipelines_own(pipe: Any) -> None:
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    pictures = pipe("cat", generator=torch.Generator().manual_seed(3), output_type="pt", **call)
    latents = pipe("cat", generator=torch.Generator().manual_seed(3), output_type="latent", **call)
    found = (decode(pipe, latents.images) + 1) / 2
    torch.testing.assert_close(found, pictures.images.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5, 7.0])
def test_the_teachers_trajectory_is_the_pipelines_cfg(
    make_pipe: Callable[[str], Any], prediction_type: str, scale: float
) -> None:
    """Scale, schedule and the order of the two predictions mean what they mean in diffusers."""
    pipe = make_pipe(prediction_type)
    steps = 4
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(14))
    texts = ["cat", "a dog"]
    call = {"num_inference_steps": steps, "output_type": "latent", "guidance_scale": scale}
    expected = pipe(texts, latents=noise.clone(), **call).images
    teacher = Teacher(pipe.unet, encoded(pipe, texts))
    schedule = NoisePath.of(pipe.scheduler)
    prompt, negative = torch.arange(2), torch.full((2,), NULL)
    walked = list(cfg_trajectories(teacher, schedule, prompt, negative, noise, scale, steps))
    assert len(walked) == steps
    last = walked[-1]
    found = schedule.ddim_step(last.latents, last.cfg, last.timestep, torch.full((2,), -1))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(walked[0].latents, noise)
    if scale == 1.0:
        torch.testing.assert_close(last.cfg, last.conditional)


def test_every_step_holds_equation_one(pipe: Any) -> None:
    teacher = Teacher(pipe.unet, encoded(pipe, ["cat", "a dog"]))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(14))
    schedule = NoisePath.of(pipe.scheduler)
    prompt, negative = torch.tensor([0]), torch.tensor([1])
    for step in cfg_trajectories(teacher, schedule, prompt, negative, noise, 3.0, 3):
        n, c = teacher(step.latents, step.timestep, prompt, negative)
        assert torch.equal(step.conditional, c)
        assert torch.equal(step.cfg, classifier_free_guidance(n, c, 3.0))
