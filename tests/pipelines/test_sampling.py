"""Sampling as an iterable, decoding by hand, and the teacher's own trajectories."""

from __future__ import annotations

from typing import Any

import accelerate
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from pilotfish.backbones import Backbone
from pilotfish.conditioning import NULL, encoded
from pilotfish.evaluation.speed import counted_rows
from pilotfish.interface import GuideError
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.sampling import cfg_trajectories, decode, encode, sample
from pilotfish.teacher import Teacher
from tests.pipelines.pipelines import Pipeline, build, guide

PROMPTS = ["cat", "a dog", "bee"]
CALL: dict[str, Any] = {"seeds": [3, 1, 3], "guidance_scale": 4.0, "num_inference_steps": 2}


@pytest.fixture
def one() -> Pipeline:
    return build("SD")


def test_one_sample_for_each_prompt_in_order(one: Pipeline) -> None:
    made = list(sample(one.pipe, PROMPTS, **CALL))
    assert [s.prompt for s in made] == PROMPTS
    assert [s.seed for s in made] == CALL["seeds"]
    for each in made:
        assert each.latents.shape == (4, 8, 8)
        assert each.image.shape == (3, 16, 16)
        assert each.image.abs().max() <= 1
        assert not each.image.requires_grad
    apart = list(sample(one.pipe, PROMPTS, batch_size=1, **CALL))
    for each, other in zip(made, apart, strict=True):
        torch.testing.assert_close(each.latents, other.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(each.image, other.image, atol=1e-4, rtol=1e-4)


def test_the_same_seed_starts_from_the_same_noise_with_and_without_a_guide(one: Pipeline) -> None:
    seen: list[torch.Tensor] = []
    one.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    call = {**CALL, "num_inference_steps": 1}
    list(sample(one.pipe, PROMPTS, **call))
    list(sample(one.pipe, PROMPTS, guide=guide("SD"), **call))
    cfg, guided = seen
    assert torch.equal(cfg.chunk(2)[0], guided)
    assert torch.equal(guided[0], guided[2])
    assert not torch.equal(guided[0], guided[1])


def test_the_guide_is_attached_while_a_batch_is_sampled(one: Pipeline) -> None:
    plain = type(one.pipe)
    with one.batches() as sizes:
        for _ in sample(one.pipe, PROMPTS, guide=guide("SD"), batch_size=2, **CALL):
            assert type(one.pipe) is plain
    assert sizes == [2, 2, 1, 1]


def test_a_guide_may_be_given_with_refreshes(one: Pipeline) -> None:
    with counted_rows(one.denoiser) as sizes:
        list(sample(one.pipe, PROMPTS, guide=Refreshed(guide("SD"), [1]), **CALL))
    assert sizes == [3, 6]
    with pytest.raises(GuideError, match="refresh must be a number of steps"):
        Refreshed(guide("SD"), -1)


@pytest.mark.parametrize("name", ["SD", "SD3", "PixArt-Sigma"])
def test_a_fresh_guide_samples_without_guidance(name: str) -> None:
    one = build(name)
    call = CALL | one.call
    guided = list(sample(one.pipe, PROMPTS, guide=guide(name, trained=False), **call))
    plain = list(sample(one.pipe, PROMPTS, **{**call, "guidance_scale": 1.0}))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(guided, plain, strict=True))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ({"seeds": [0, 1]}, "3 prompts but 2 seeds"),
        ({"negative_prompts": ["red"]}, "3 prompts but 1 negative prompts"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
    ],
)
def test_a_call_that_cannot_be_sampled_is_refused(
    one: Pipeline, call: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        sample(one.pipe, PROMPTS, **(CALL | call))


VAES: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "SD": ("SD", {}, torch.float32),
    "SD, several": ("SD", {}, torch.bfloat16),
    "SDXL": ("SDXL", {}, torch.float32),
    "SDXL, mean and standard deviation": (
        "SDXL", {"latents_mean": [0.5, -1.0, 2.0, 0.1], "latents_std": [0.5, 2.0, 3.0, 1.5]},
        torch.float32,
    ),
    "SDXL, force_upcast": ("SDXL", {"force_upcast": True}, torch.float16),
    "SDXL, force_upcast, mean and standard deviation": (
        "SDXL",
        {"force_upcast": True, "latents_mean": [0.5, -1.0, 2.0, 0.1],
         "latents_std": [0.5, 2.0, 3.0, 1.5]},
        torch.float16,
    ),
    "SD3, shift_factor": ("SD3", {"shift_factor": 1.5}, torch.float32),
    "SD3, half": ("SD3", {"shift_factor": 1.5}, torch.bfloat16),
    "PixArt-Sigma": ("PixArt-Sigma", {}, torch.float32),
}  # fmt: skip
"""A pipeline, what is particular in its VAE's configuration, and its precision."""


@pytest.mark.parametrize("case", VAES)
def test_decoding_is_the_pipelines_own(case: str) -> None:
    name, config, dtype = VAES[case]
    one = build(name, alone=True)
    vae = one.pipe.vae
    kept = {k: v for k, v in vae.config.items() if k[0] != "_"}
    one.pipe.vae = AutoencoderKL(**(kept | config)).eval()
    one.pipe.vae.load_state_dict(vae.state_dict())
    one.pipe.to(dtype)
    call = {"num_inference_steps": 1, "guidance_scale": 1.0}
    images = one.latents(output_type="pt", **call)
    found = (decode(one.pipe, one.latents(**call)) + 1) / 2
    assert images.float().std() > 0.01
    close = {"atol": 4e-3, "rtol": 0.0} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, images.float(), **close)
    assert one.pipe.vae.dtype == dtype


@pytest.mark.parametrize("scale", [1.0, 7.0])
@pytest.mark.parametrize(
    ("name", "shift"),
    [
        *((name, None) for name in ("SD", "SD, v", "SD3", "PixArt-Sigma", "CogView4")),
        *(("CogView4", shift) for shift in ("linear", "exponential")),
    ],
)
def test_the_teachers_trajectory_is_the_pipelines_cfg(
    name: str, shift: Any, scale: float
) -> None:  # fmt: skip
    """Scale, schedule and the order of the two predictions mean what they mean in diffusers."""
    one, steps, texts = build(name), 4, ["cat", "a dog"]
    if shift is not None:  # by the size of the image
        one.pipe.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, time_shift_type=shift, base_shift=0.25, max_shift=0.75
        )
    backbone = Backbone.of(one.denoiser)
    channels = one.pipe.vae.config.latent_channels
    noise = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(14))
    path = backbone.noise_path(one.pipe)
    # its own grid of few steps is another
    call: dict[str, Any] = backbone.even_grid(steps) if path.prediction_type == "flow" else {}
    if name == "SD3":
        call["max_sequence_length"] = 256  # as texts are encoded by the library
    if name == "PixArt-Sigma":
        call["max_sequence_length"] = 300
    expected = one.latents(
        texts, latents=noise.clone(), num_inference_steps=steps, guidance_scale=scale, **call
    )
    teacher = Teacher(one.denoiser, encoded(one.pipe, texts), backbone.sizes(one.pipe))
    prompt, negative = torch.arange(2), torch.full((2,), NULL)
    walked = list(cfg_trajectories(teacher, path, prompt, negative, noise, scale, steps))
    assert len(walked) == steps
    last, end = walked[-1], path.grid(steps)[-1].expand(2)
    found = path.step(last.latents, last.cfg, last.time, end)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(walked[0].latents, noise)
    if scale == 1.0:
        torch.testing.assert_close(last.cfg, last.conditional)


def test_an_offloaded_vae_decodes_and_encodes() -> None:
    one = build("SD", alone=True)
    (expected,) = sample(one.pipe, ["cat"], seeds=[0], guidance_scale=4.0, num_inference_steps=2)
    latents = encode(one.pipe, expected.image[None])
    accelerate.cpu_offload(one.pipe.vae, torch.device("cpu"))
    assert one.pipe.vae.device.type == "meta"
    (made,) = sample(one.pipe, ["cat"], seeds=[0], guidance_scale=4.0, num_inference_steps=2)
    torch.testing.assert_close(made.image, expected.image)
    torch.testing.assert_close(encode(one.pipe, expected.image[None]), latents)


def test_the_progress_bar_stays_as_it_was() -> None:
    one = build("SD", alone=True)
    one.pipe.set_progress_bar_config(desc="mine", disable=False)
    list(sample(one.pipe, ["cat"], seeds=[0], guidance_scale=4.0, num_inference_steps=2))
    assert one.pipe._progress_bar_config == {"desc": "mine", "disable": False}
