"""The noise schedule against itself and against diffusers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.noise import NoisePath, sampling_timesteps

TIMES = torch.tensor([0, 1, 250, 600, 998])


def latents(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x, eps = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x, eps


def truth(schedule: NoisePath, x: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """What a perfect denoiser would say."""
    if schedule.prediction_type == "epsilon":
        return eps
    a = schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return a.sqrt() * eps - (1 - a).sqrt() * x


def test_split_recovers_what_add_noise_mixed(schedule: NoisePath) -> None:
    x, eps = latents()
    z = schedule.add_noise(x, eps, TIMES)
    again, noise = schedule.split(z, truth(schedule, x, eps, TIMES), TIMES)
    torch.testing.assert_close(again, x, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(noise, eps, atol=1e-4, rtol=1e-4)


def test_a_true_prediction_steps_along_the_forward_process(schedule: NoisePath) -> None:
    x, eps = latents()
    to = torch.tensor([999, 0, 750, 10, 500])
    z = schedule.add_noise(x, eps, TIMES)
    stepped = schedule.ddim_step(z, truth(schedule, x, eps, TIMES), TIMES, to)
    expected = schedule.add_noise(x, eps, to)
    torch.testing.assert_close(stepped, expected, atol=1e-3, rtol=1e-3)


def test_a_step_and_its_reverse_cancel(schedule: NoisePath) -> None:
    x, eps = latents()
    to = torch.full((5,), 400)
    z = schedule.add_noise(x, eps, TIMES)
    there = schedule.ddim_step(z, truth(schedule, x, eps, TIMES), TIMES, to)
    back = schedule.ddim_step(there, truth(schedule, x, eps, to), to, TIMES)
    torch.testing.assert_close(back, z, atol=1e-3, rtol=1e-3)


def test_the_prediction_between_two_points_leads_from_one_to_the_other(schedule: NoisePath) -> None:
    z, prediction = (x[2:] for x in latents())
    here = TIMES[2:]
    for to in (here // 2, torch.full_like(here, -1)):
        goal = schedule.ddim_step(z, prediction, here, to)
        found = schedule.prediction_between(z, goal, here, to)
        torch.testing.assert_close(found, prediction, atol=1e-3, rtol=1e-3)


def test_add_noise_is_that_of_diffusers(schedule: NoisePath) -> None:
    x, eps = latents()
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    expected = scheduler.add_noise(x, eps, TIMES)
    torch.testing.assert_close(schedule.add_noise(x, eps, TIMES), expected)


@pytest.mark.parametrize("ends_clean", [True, False])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_the_step_is_that_of_diffusers(prediction_type: str, ends_clean: bool, index: int) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=ends_clean,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(5)
    grid = sampling_timesteps(5)
    z, prediction = latents()
    expected = scheduler.step(prediction, scheduler.timesteps[index], z).prev_sample
    here, there = grid[index].expand(5), grid[index + 1].expand(5)
    stepped = NoisePath.of(scheduler).ddim_step(z, prediction, here, there)
    torch.testing.assert_close(stepped, expected)


def test_every_latent_steps_at_its_own_time(schedule: NoisePath) -> None:
    z, prediction = latents()
    to = torch.tensor([-1, 0, 100, 599, 900])
    together = schedule.ddim_step(z, prediction, TIMES, to)
    for i in range(5):
        one = slice(i, i + 1)
        alone = schedule.ddim_step(z[one], prediction[one], TIMES[one], to[one])
        torch.testing.assert_close(together[one], alone)


def test_sampling_timesteps_are_those_of_diffusers() -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps in [*range(1, 130), 144, 250, 333, 500, 1000]:
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps[:steps]  # diffusers may add a -1 by rounding
        assert torch.equal(sampling_timesteps(steps)[:-1], expected), steps


@given(st.data())
def test_sampling_timesteps_fall_from_last_to_minus_one(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 1000))
    steps = data.draw(st.integers(1, total))
    t = sampling_timesteps(steps, total)
    assert t.shape == (steps + 1,)
    assert t.dtype == torch.int64
    assert t[0] == total - 1
    assert t[-1] == -1
    assert (t.diff() < 0).all()


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_wrong_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=r"\[1, 1000\]"):
        sampling_timesteps(steps)


def test_a_negative_time_is_past_the_last_step() -> None:
    schedule = NoisePath(torch.linspace(0.99, 0.01, 10), "epsilon", final_alpha_cumprod=0.995)
    found = schedule.alpha(torch.tensor([0, 9, -1]))
    torch.testing.assert_close(found, torch.tensor([0.99, 0.01, 0.995]))


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match="'sample'"):
        NoisePath.of(DDIMScheduler(prediction_type="sample"))


def test_a_scheduler_without_alphas_is_refused() -> None:
    with pytest.raises(ValueError, match="no alphas_cumprod"):
        NoisePath.of(np.zeros(3))
