"""Pipelines of videos: frames, sizes and schedules are those of the pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from pilotfish.backbones import Backbone
from pilotfish.backbones.tokens import to_tokens
from pilotfish.conditioning import NULL, encoded
from pilotfish.noise import NoisePath
from pilotfish.pipelines.loading import use_deterministic_scheduler
from pilotfish.pipelines.sampling import cfg_trajectories, middle_frame, sample, to_pil
from pilotfish.teacher import Teacher
from tests import components
from tests.components import TOKENS
from tests.pipelines.pipelines import PROMPTS, Pipeline, build, guide
from tests.pipelines.specs import SIDE

CALL: dict[str, Any] = {"num_inference_steps": 2, "num_frames": 5}


def wan(**vae: Any) -> Pipeline:
    """Wan 2.1, two frames for one latent."""
    frames = {"temperal_downsample": [True], "scale_factor_temporal": 2}
    return build("Wan", vae=components.video_autoencoder(**frames | vae))


def wan_5b() -> Pipeline:
    """Wan 2.2 with one denoiser, whose VAE takes patches, and a time for each token."""
    one = wan(patch_size=2, in_channels=12, out_channels=12, scale_factor_spatial=4)
    one.pipe.register_to_config(expand_timesteps=True)
    one.call = one.call | {"height": 2 * SIDE, "width": 2 * SIDE}
    return one


def ltx(**vae: Any) -> Pipeline:
    """LTX-Video with statistics of its latents, and a schedule that depends on their number."""
    made = components.ltx_autoencoder(scaling_factor=0.7, **vae)
    made.latents_mean.uniform_(-0.5, 0.5)
    made.latents_std.uniform_(0.5, 1.5)
    one = build("LTX", vae=made)
    one.pipe.scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.1, base_shift=0.95, max_shift=2.05,
        base_image_seq_len=64,
    )  # fmt: skip
    return one


VIDEOS: dict[str, Callable[[], Pipeline]] = {
    "Wan 2.1": wan,
    "Wan 2.2, 5B": wan_5b,
    "LTX-Video": ltx,
    "LTX-Video, decoded at a time": lambda: ltx(
        timestep_conditioning=True, decoder_inject_noise=(False,) * 5
    ),
}


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("size", [(2 * SIDE, 2 * SIDE), (2 * SIDE, 4 * SIDE)])
def test_samples_are_the_pipelines_videos(name: str, size: tuple[int, int]) -> None:
    one, (height, width) = VIDEOS[name](), size
    call: dict[str, Any] = CALL | {"height": height, "width": width, "max_sequence_length": TOKENS}
    made = list(sample(one.pipe, PROMPTS, seeds=[0, 1], guidance_scale=4.0, **call))
    videos = torch.stack([each.image for each in made])
    assert videos.shape == (2, 3, 5, height, width)
    generator = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    found = one.latents(generator=generator, output_type="pt", **call)
    torch.testing.assert_close((videos.transpose(1, 2) + 1) / 2, found, atol=1e-5, rtol=1e-4)
    assert videos.std() > 0.01
    backbone = Backbone.of_pipeline(one.pipe)
    latents = (
        backbone.latent_frames_of(one.pipe, 5),
        *(n // backbone.vae_factor(one.pipe) for n in size),
    )
    assert made[0].latents.shape == (4, *latents)
    frames = to_pil(one.pipe, videos[0])
    assert [frame.size for frame in frames] == [(width, height)] * 5
    assert torch.equal(middle_frame(videos[0]), videos[0, :, 2])
    assert torch.equal(middle_frame(videos[0, :, 2]), videos[0, :, 2])


@pytest.mark.parametrize("name", list(VIDEOS)[:3])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_teachers_trajectory_is_the_pipelines_cfg(name: str, scale: float) -> None:
    """Positions, times and the schedule by the number of latents mean what they mean there."""
    one, steps = VIDEOS[name](), 4
    if "Wan" in name:
        one.pipe.scheduler = UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        )
        use_deterministic_scheduler(one.pipe)
    height, width = (one.call[side] for side in ("height", "width"))
    plain = Backbone.of_pipeline(one.pipe)
    backbone = plain.at(
        plain.latent_size_of(one.pipe, height, width), plain.latent_frames_of(one.pipe, 5)
    )
    path = backbone.noise_path(one.pipe)
    noise = torch.randn(2, *backbone.latent_shape(), generator=torch.Generator().manual_seed(14))
    texts = encoded(one.pipe, PROMPTS)
    call = {
        "latents": to_tokens(noise) if "LTX" in name else noise, "guidance_scale": scale,
        "max_sequence_length": texts.null.embeds.shape[1], **backbone.even_grid(steps),
    }  # fmt: skip
    expected = backbone.final_latents(one.latents(**call), one.pipe, one.call)
    torch.testing.assert_close(path.grid(steps), one.pipe.scheduler.sigmas)
    teacher = Teacher(one.denoiser, texts, backbone.sizes(one.pipe))
    prompt, negative = torch.arange(2), torch.full((2,), NULL)
    last = list(cfg_trajectories(teacher, path, prompt, negative, noise, scale, steps))[-1]
    end = path.grid(steps)[-1].expand(2)
    found = path.step(last.latents, last.cfg, last.time, end)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("steps", [4, 25])
def test_the_times_of_wans_own_scheduler_are_near_the_grid(steps: int) -> None:
    """It counts whole timesteps, and ends a little lower."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    grid = NoisePath.of(scheduler).grid(steps)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(grid, scheduler.sigmas, atol=5e-3, rtol=0)
    torch.testing.assert_close(grid[:-1], scheduler.timesteps / 1000, atol=6e-3, rtol=0)


def test_the_steps_of_wans_euler_are_those_that_a_guide_is_distilled_to() -> None:
    """Without a warning; with its own scheduler it is said which one takes them."""
    one, used = wan(), guide("Wan")
    path = Backbone.of_pipeline(one.pipe).noise_path(one.pipe)
    used.register_to_config(times=path.grid(2)[:-1].tolist())
    with (
        used.attached(one.pipe, refresh=0),
        pytest.warns(UserWarning, match=r"num_inference_steps=2 and the scheduler of pilotfish"),
    ):
        one.latents()
    use_deterministic_scheduler(one.pipe)
    with used.attached(one.pipe, refresh=0), warnings.catch_warnings():
        warnings.filterwarnings("error", "this guide was distilled")
        one.latents()


def test_a_pipeline_with_wans_euler_can_be_saved(tmp_path: Path) -> None:
    """With diffusers' scheduler, which is given the times again; a copy has times of its own."""
    one, call = wan(), {"num_inference_steps": 3}
    stock = one.latents(**call)
    use_deterministic_scheduler(one.pipe)
    made = one.latents(**call)
    grid = Backbone.of_pipeline(one.pipe).noise_path(one.pipe).grid(3)
    for scheduler in (deepcopy(one.pipe.scheduler), one.pipe.scheduler):
        scheduler.set_timesteps(3)
        torch.testing.assert_close(scheduler.sigmas, grid)
        scheduler.set_timesteps(5)
    assert len(one.pipe.scheduler.sigmas) == 6
    one.pipe.save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe.scheduler) is FlowMatchEulerDiscreteScheduler
    loaded = Pipeline(pipe, call=one.call)
    assert torch.equal(loaded.latents(**call), stock)
    assert not torch.allclose(stock, made)
    use_deterministic_scheduler(pipe)
    assert torch.equal(loaded.latents(**call), made)


@pytest.mark.parametrize(
    ("name", "frames", "said"),
    [
        ("Wan", 4, "of a WanPipeline must be 1 more than a multiple of 4, such as 5, not 4"),
        ("Wan", 12, "such as 9, not 12"),
        ("LTX", 0, "of a LTXPipeline must be 1 more than a multiple of 4, such as 5, not 0"),
        ("SD", 5, "num_frames is for videos, and a StableDiffusionPipeline makes images"),
    ],
)
def test_frames_that_a_pipeline_does_not_take_are_refused(
    name: str, frames: int, said: str
) -> None:  # fmt: skip
    with pytest.raises(ValueError, match=said):
        sample(build(name).pipe, ["cat"], seeds=[0], guidance_scale=4.0, num_frames=frames)


def test_the_default_size_is_the_pipelines() -> None:
    """Of the real VAEs: 8 pixels for one latent, 16 for Wan 2.2 with 5 billion parameters."""
    small = Backbone.of(components.wan_transformer(in_channels=16, out_channels=16))
    assert small.latent_shape() == (16, 21, 480 // 8, 832 // 8)
    large = Backbone.of(components.wan_transformer(in_channels=48, out_channels=48))
    assert large.latent_shape() == (48, 21, 480 // 16, 832 // 16)
    assert large.at((4, 6), 3).latent_shape() == (48, 3, 4, 6)
    assert large.at(None, 3).latent_shape() == (48, 3, 30, 52)
