"""Families whose latents are packed: one of the denoiser's is four of the VAE's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from pilotfish.backbones import Backbone
from pilotfish.backbones.tokens import to_tokens
from pilotfish.conditioning import NULL, encoded
from pilotfish.pipelines.sampling import cfg_trajectories, decode, encode, image_size, sample
from pilotfish.teacher import Teacher
from tests.pipelines.pipelines import PROMPTS, Pipeline, build, without_bins
from tests.pipelines.specs import SIDE


@pytest.fixture(params=["Qwen-Image", "Chroma", "FLUX.2 klein"])
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A pipeline of small images, with a schedule that depends on their size."""
    one = build(request.param)
    without_bins(type(one.pipe), monkeypatch)
    one.pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, base_shift=0.5, max_shift=0.9,
        max_image_seq_len=8192,
    )  # fmt: skip
    return one


@pytest.mark.parametrize("size", [(SIDE, SIDE), (SIDE // 2, SIDE)])
def test_samples_are_the_pipelines_images(small: Pipeline, size: tuple[int, int]) -> None:
    height, width = size
    call: dict[str, Any] = {"num_inference_steps": 2, "height": height, "width": width}
    made = list(sample(small.pipe, PROMPTS, seeds=[0, 1], guidance_scale=4.0, **call))
    images = torch.stack([one.image for one in made])
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    found = small.latents(generator=generator, output_type="pt", **call)
    torch.testing.assert_close((images + 1) / 2, found, atol=1e-5, rtol=1e-4)
    assert made[0].latents.shape == (16, height // 4, width // 4)
    assert images.std() > 0.01
    given = {"seeds": [0, 1], "guidance_scale": 4.0, "negative_prompts": ["red"] * 2} | call
    others = list(sample(small.pipe, PROMPTS, **given))
    assert not torch.allclose(others[0].latents, made[0].latents)


def test_what_is_encoded_is_what_is_decoded(small: Pipeline) -> None:
    """The denoiser's latents are those of the pipeline."""
    pipe, size = small.pipe, image_size(small.pipe)
    assert size == SIDE
    pixels = 2 * torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3)) - 1
    latents = encode(pipe, pixels)
    assert latents.shape == (2, 16, 4, 4)
    assert decode(pipe, latents).shape == pixels.shape
    backbone = Backbone.of_pipeline(pipe)
    torch.testing.assert_close(
        backbone.from_vae(pipe.vae, backbone.to_vae(pipe.vae, latents)), latents
    )
    with torch.no_grad():
        if "Klein" in type(pipe).__name__:
            packed = to_tokens(pipe._encode_vae_image(pixels, None))
        elif "Qwen" in type(pipe).__name__:
            mean, std = (torch.tensor(pipe.vae.config[f"latents_{k}"]) for k in ("mean", "std"))
            own = pipe.vae.encode(pixels[:, :, None]).latent_dist.mean
            own = (own - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
            packed = pipe._pack_latents(own[:, :, 0][:, None], 2, 4, size // 2, size // 2)
        else:
            config = pipe.vae.config
            own = pipe.vae.encode(pixels).latent_dist.mean
            own = (own - config.shift_factor) * config.scaling_factor
            packed = pipe._pack_latents(own, 2, 4, size // 2, size // 2)
    torch.testing.assert_close(to_tokens(latents), packed)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_teachers_trajectory_is_the_pipelines_cfg(small: Pipeline, scale: float) -> None:
    """With a schedule that depends on the size of the image."""
    pipe, steps, backbone = small.pipe, 4, Backbone.of(small.denoiser)
    path = backbone.noise_path(pipe)
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(14))
    given = noise if "Klein" in type(pipe).__name__ else to_tokens(noise)
    call = {"latents": given, "num_inference_steps": steps, "guidance_scale": scale}
    expected = backbone.final_latents(small.latents(**call), pipe, {})
    teacher = Teacher(small.denoiser, encoded(pipe, PROMPTS))
    prompt, negative = torch.arange(2), torch.full((2,), NULL)
    last = list(cfg_trajectories(teacher, path, prompt, negative, noise, scale, steps))[-1]
    end = path.grid(steps)[-1].expand(2)
    found = path.step(last.latents, last.cfg, last.time, end)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
