"""The noise path: identities of its equations, and agreement with diffusers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from pilotfish.guidance import per_sample
from pilotfish.noise import PREDICTION_TYPES, NoisePath, prediction_type
from tests import components

TIME = torch.tensor([0.0, 0.001, 0.25, 0.6, 0.998])


def flow_scheduler(**config: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{"shift": 3.0} | config)


@pytest.fixture(params=PREDICTION_TYPES)
def path(request: pytest.FixtureRequest) -> NoisePath:
    """The path of a scheduler for every prediction type."""
    if request.param == "flow":
        return NoisePath.of(flow_scheduler())
    return NoisePath.of(components.scheduler(request.param))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def eps() -> torch.Tensor:
    return torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def exact(path: NoisePath, x: torch.Tensor, eps: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The prediction that stands for x and eps, by its definition."""
    alpha, sigma = (per_sample(value, x) for value in path.alpha_sigma(time))
    return {"epsilon": eps, "v_prediction": alpha * eps - sigma * x, "flow": eps - x}[
        path.prediction_type
    ]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-3) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_split_inverts_add_noise(path: NoisePath, x: torch.Tensor, eps: torch.Tensor) -> None:
    z = path.add_noise(x, eps, TIME)
    x_again, eps_again = path.split(z, exact(path, x, eps, TIME), TIME)
    close(x_again, x)
    close(eps_again, eps, 1e-4)


def test_the_exact_prediction_steps_along_the_forward_process(
    path: NoisePath, x: torch.Tensor, eps: torch.Tensor
) -> None:
    to = torch.tensor([0.999, 0.0, 0.75, 0.01, 0.5])
    z = path.add_noise(x, eps, TIME)
    close(path.step(z, exact(path, x, eps, TIME), TIME, to), path.add_noise(x, eps, to))


def test_a_step_to_the_same_time_is_the_identity(
    path: NoisePath, x: torch.Tensor, eps: torch.Tensor
) -> None:
    torch.testing.assert_close(path.step(x, eps, TIME, TIME), x, atol=1e-5, rtol=1e-5)


def test_prediction_between_solves_step(
    path: NoisePath, x: torch.Tensor, eps: torch.Tensor
) -> None:
    time = TIME[2:]
    past_the_end = -0.001 if path.prediction_type != "flow" else 0.0
    for to in (time / 2, torch.full_like(time, past_the_end)):
        goal = path.step(x[2:], eps[2:], time, to)
        close(path.prediction_between(x[2:], goal, time, to), eps[2:])


def test_each_sample_steps_at_its_own_time(
    path: NoisePath, x: torch.Tensor, eps: torch.Tensor
) -> None:
    to = torch.tensor([-0.001, 0.0, 0.1, 0.599, 0.9]).clamp(
        min=-1 * (path.prediction_type != "flow")
    )
    time = TIME.clamp(min=0.002)
    together = path.step(x, eps, time, to)
    for i in range(5):
        one = slice(i, i + 1)
        torch.testing.assert_close(together[one], path.step(x[one], eps[one], time[one], to[one]))


def test_add_noise_equals_that_of_diffusers(x: torch.Tensor, eps: torch.Tensor) -> None:
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    timesteps = (TIME * 1000).round().long()
    torch.testing.assert_close(
        NoisePath.of(ddpm).add_noise(x, eps, TIME), ddpm.add_noise(x, eps, timesteps)
    )
    euler = flow_scheduler(shift=1.0)
    timesteps = euler.timesteps[[0, 100, 500, 900, 999]]
    torch.testing.assert_close(
        NoisePath.of(euler).add_noise(x, eps, timesteps / 1000),
        euler.scale_noise(x, timesteps, eps),
    )


@pytest.mark.parametrize("final", [True, False], ids=["to a clean image", "to the first time"])
@pytest.mark.parametrize("predicted", ["epsilon", "v_prediction"])
def test_steps_equal_those_of_the_ddim_scheduler(
    predicted: str, final: bool, x: torch.Tensor
) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=final, prediction_type=predicted, timestep_spacing="trailing",
    )  # fmt: skip
    path, grid = NoisePath.of(scheduler), NoisePath.of(scheduler).grid(5)
    scheduler.set_timesteps(5)
    mine = theirs = x
    for (time, to), timestep in zip(pairwise(grid), scheduler.timesteps, strict=True):
        assert round(float(time) * 1000) == timestep
        theirs = scheduler.step(theirs.cos(), timestep, theirs).prev_sample
        mine = path.step(mine, mine.cos(), time.expand(5), to.expand(5))
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_steps_equal_those_of_the_euler_scheduler_for_flow(shift: float, x: torch.Tensor) -> None:
    scheduler = flow_scheduler(shift=shift)
    path = NoisePath.of(scheduler)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 5, 5).tolist())
    torch.testing.assert_close(path.grid(5), scheduler.sigmas)
    mine = theirs = x
    for (time, to), timestep in zip(pairwise(path.grid(5)), scheduler.timesteps, strict=True):
        assert float(time) * 1000 == pytest.approx(float(timestep))
        theirs = scheduler.step(theirs.cos(), timestep, theirs).prev_sample
        mine = path.step(mine, mine.cos(), time.expand(5), to.expand(5))
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


# -- grids -------------------------------------------------------------------------------------


def test_grids_fall_from_noise_and_are_nested(path: NoisePath) -> None:
    first, last = (1.0, 0.0) if path.prediction_type == "flow" else (0.999, -0.001)
    for steps in [*range(1, 131), 144, 250, 333, 499, 500]:
        grid = path.grid(steps)
        assert grid.shape == (steps + 1,), steps
        assert grid.dtype == torch.float32
        assert (grid.diff() < 0).all()
        assert [float(grid[0]), float(grid[-1])] == pytest.approx([first, last])
        rounding = 1e-6 if path.prediction_type == "flow" else 1.001e-3  # to whole timesteps
        assert torch.allclose(grid, path.grid(2 * steps)[::2], atol=rounding, rtol=0), steps


def test_grids_of_powers_of_two_steps_are_nested_exactly(path: NoisePath) -> None:
    for steps in (1, 2, 4, 8, 16, 32):
        assert torch.allclose(path.grid(steps), path.grid(2 * steps)[::2], atol=1e-6), steps


def test_a_grid_of_every_timestep(path: NoisePath) -> None:
    assert path.grid(1000).shape == (1001,)


def test_the_grid_does_not_change_the_scheduler() -> None:
    scheduler = components.scheduler("epsilon")
    scheduler.set_timesteps(7)
    NoisePath.of(scheduler).grid(3)
    assert len(scheduler.timesteps) == 7


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_wrong_number_of_steps_is_refused(path: NoisePath, steps: int) -> None:
    with pytest.raises(ValueError, match=r"\[1, 1000\]"):
        path.grid(steps)


# -- schedulers --------------------------------------------------------------------------------


@given(st.sampled_from(["epsilon", "v_prediction"]), st.integers(0, 999))
def test_the_path_is_that_of_the_pipeline_whatever_its_scheduler(predicted: str, t: int) -> None:
    ddim = components.scheduler(predicted)
    time = torch.tensor([t / 1000])
    for other in (DPMSolverMultistepScheduler, EulerDiscreteScheduler):
        path = NoisePath.of(other.from_config(ddim.config))
        assert path.prediction_type == predicted
        assert torch.equal(path.alpha_sigma(time)[0], NoisePath.of(ddim).alpha_sigma(time)[0])


@given(st.floats(0, 1))
def test_alpha_and_sigma_lie_on_the_path(t: float) -> None:
    time = torch.tensor([t])
    alpha, sigma = NoisePath.of(components.scheduler("epsilon")).alpha_sigma(time)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1))
    alpha, sigma = NoisePath.of(flow_scheduler()).alpha_sigma(time)
    torch.testing.assert_close(alpha + sigma, torch.ones(1))


def test_a_negative_time_is_past_the_last_step() -> None:
    path = NoisePath("epsilon", torch.linspace(0.99, 0.01, 10), final_alpha_cumprod=0.995)
    alpha, _ = path.alpha_sigma(torch.tensor([0.0, 0.9, -0.1]))
    torch.testing.assert_close(alpha**2, torch.tensor([0.99, 0.01, 0.995]))


def test_what_a_scheduler_predicts() -> None:
    assert prediction_type(components.scheduler("v_prediction")) == "v_prediction"
    assert prediction_type(flow_scheduler()) == "flow"
    solver = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    assert prediction_type(solver) == "flow"
    assert torch.equal(NoisePath.of(solver).grid(8), NoisePath.of(flow_scheduler()).grid(8))


@pytest.mark.parametrize("name", ["beta", "exponential", "karras"])
def test_a_scheduler_of_uneven_steps_gives_an_even_grid(name: str) -> None:
    uneven = flow_scheduler(**{f"use_{name}_sigmas": True})
    assert torch.equal(NoisePath.of(uneven).grid(8), NoisePath.of(flow_scheduler()).grid(8))


def test_a_schedule_by_the_size_of_images_is_refused_where_its_rule_is_not_known() -> None:
    scheduler = flow_scheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="shifts its times by the size of images"):
        NoisePath.of(scheduler)
    grids = [NoisePath.of(scheduler, mu).grid(2)[1] for mu in (lambda n: 0.5, lambda n: n / 4)]
    assert grids[0] == grids[1]
    assert NoisePath.of(scheduler, shift=2.0).grid(2)[1] == 0.5


def test_a_single_step_goes_from_noise_to_the_image() -> None:
    """Also where the times are stretched to a last one, as with Qwen-Image and LTX-Video."""
    assert NoisePath.of(flow_scheduler()).grid(1).tolist() == [1, 0]
    stretched = NoisePath.of(flow_scheduler(shift_terminal=0.1))
    assert stretched.grid(1).tolist() == [1, 0]
    assert stretched.grid(4)[-2:].tolist() == pytest.approx([0.1, 0])


def test_a_scheduler_without_a_known_path_is_refused() -> None:
    with pytest.raises(ValueError, match="'sample'"):
        NoisePath.of(DDIMScheduler(prediction_type="sample"))
    scheduler = components.scheduler("epsilon")
    del scheduler.alphas_cumprod
    with pytest.raises(ValueError, match="no alphas_cumprod"):
        NoisePath.of(scheduler)
