"""Pipelines of Qwen-Image that take one prompt at a time, or another denoiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

from pilotfish import GuideError
from pilotfish.backbones import Backbone
from pilotfish.backbones.tokens import to_tokens
from pilotfish.conditioning import NULL, encoded
from pilotfish.pipelines.sampling import cfg_trajectories, decode, encode, image_size, sample
from pilotfish.teacher import Teacher
from tests import components, editing
from tests.pipelines.pipelines import PROMPTS, SIDE, Pipeline, build, guide, without_bins
from tests.pipelines.test_refresh import ALL

CHANNELS = {"in_channels": 16, "out_channels": 4}


def plus(**config: Any) -> tuple[Pipeline, dict[str, Any]]:
    """One that edits two images together, and the arguments of its call."""
    parts = {"transformer": components.qwen_transformer(**CHANNELS | config)}
    one = build("Qwen-Image edit", "QwenImageEditPlusPipeline", **parts)
    call = {"prompt": ["cat"], "negative_prompt": ["a"], "image": one.images["image"]}
    return one, call


def inpaint() -> tuple[Pipeline, dict[str, Any]]:
    """One that edits a part of an image, and the arguments of its call."""
    one = build("Qwen-Image edit", "QwenImageEditInpaintPipeline")
    mask = Image.new("L", (SIDE, SIDE))
    mask.paste(255, (0, 0, SIDE, SIDE // 2))
    call = {
        "prompt": ["cat"], "negative_prompt": ["a"], "image": one.images["image"][:1],
        "mask_image": mask, "strength": 1.0, "height": editing.SIDE, "width": editing.SIDE,
    }  # fmt: skip
    return one, call


@pytest.mark.parametrize(
    "make", [plus, inpaint, lambda: plus(zero_cond_t=True)], ids=["plus", "inpaint", "plus, 2511"]
)
def test_editing(make: Callable[[], tuple[Pipeline, dict[str, Any]]]) -> None:
    """The images' tokens follow the latents', with zero_cond_t at a time of their own."""
    one, call = make()
    conditional, cfg = one.latents(guidance_scale=1.0, **call), one.latents(**call)
    with guide("Qwen-Image", trained=False).attached(one.pipe), one.batches() as sizes:
        assert torch.equal(one.latents(**call), conditional)
    assert sizes == [1, 1]
    with guide("Qwen-Image").attached(one.pipe):
        assert not torch.allclose(one.latents(**call), conditional)
    with guide("Qwen-Image").attached(one.pipe, refresh=ALL), one.batches() as sizes:
        torch.testing.assert_close(one.latents(**call), cfg, rtol=1e-5, atol=1e-5)
    assert sizes == [2, 2]
    assert torch.equal(one.latents(**call), cfg)


def test_the_controlnet_runs_once_on_the_prompt() -> None:
    one = build("Qwen-Image ControlNet")
    sizes: list[int] = []
    one.pipe.controlnet.register_forward_pre_hook(
        lambda net, args, given: sizes.append(len(given["encoder_hidden_states"])),
        with_kwargs=True,
    )
    with guide("Qwen-Image ControlNet").attached(one.pipe, refresh=[1]), one.batches() as batches:
        one.latents()
    assert batches == [2, 4]
    assert sizes == [2, 2]


def test_several_layers_of_an_image_are_refused() -> None:
    parts = build("Qwen-Image edit").pipe.components
    parts["transformer"] = components.qwen_transformer(use_additional_t_cond=True)
    pipe = diffusers.QwenImageLayeredPipeline(**parts)
    with pytest.raises(GuideError, match="LayeredPipeline cannot take a guide: its denoiser gen"):
        guide("Qwen-Image").attach(pipe)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A pipeline of small images, with the schedule of Qwen-Image."""
    one = build("Qwen-Image")
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
    (mean, std), vae = (torch.tensor(pipe.vae.config[f"latents_{k}"]) for k in ("mean", "std")), 2
    with torch.no_grad():
        own = pipe.vae.encode(pixels[:, :, None]).latent_dist.mean
        own = (own - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
        packed = pipe._pack_latents(own[:, :, 0][:, None], 2, 4, size // vae, size // vae)
    torch.testing.assert_close(to_tokens(latents), packed)
    assert decode(pipe, latents).shape == pixels.shape


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_teachers_trajectory_is_the_pipelines_cfg(small: Pipeline, scale: float) -> None:
    """With a schedule that depends on the size of the image."""
    pipe, steps, backbone = small.pipe, 4, Backbone.of(small.denoiser)
    path = backbone.noise_path(pipe)
    noise = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(14))
    call = {"latents": to_tokens(noise), "num_inference_steps": steps, "guidance_scale": scale}
    expected = backbone.final_latents(small.latents(**call), pipe, {})
    teacher = Teacher(small.denoiser, encoded(pipe, PROMPTS))
    prompt, negative = torch.arange(2), torch.full((2,), NULL)
    last = list(cfg_trajectories(teacher, path, prompt, negative, noise, scale, steps))[-1]
    end = path.grid(steps)[-1].expand(2)
    found = path.step(last.latents, last.cfg, last.time, end)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
