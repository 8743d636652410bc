"""Where training samples come from, and that they resume exactly."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from pilotfish.conditioning import NULL
from pilotfish.guidance import classifier_free_guidance
from pilotfish.noise import NoisePath
from pilotfish.training.pool import Pool
from pilotfish.training.samples import Replay, Source, TrainingSamples
from pilotfish.training.trajectories import (
    CFGTrajectories,
    HalvedTrajectories,
    NoisedImages,
)
from tests.training.test_samples import equal, seeded

SHAPE, SCALES, PROMPTS = (4, 8, 8), (1.5, 6.0), 5


class Predictions:
    """Two predictions that differ by prompts and time."""

    guided = staticmethod(classifier_free_guidance)

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        tone = (prompt + 1).reshape(-1, 1, 1, 1) * 0.01 + time.reshape(-1, 1, 1, 1) * 0.1
        return 0.9 * latents + (negative + 1).reshape(-1, 1, 1, 1) * 0.02, 0.9 * latents + tone


teacher = Predictions()


def guided(
    z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor, negative: torch.Tensor,
    w: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    tone = (prompt - 0.5 * negative + 1).reshape(-1, 1, 1, 1) * 0.01 + t.reshape(-1, 1, 1, 1) * 0.1
    return 0.9 * z + w.reshape(-1, 1, 1, 1) * tone


def constant(samples: TrainingSamples) -> torch.Tensor:
    return torch.full_like(samples.latents, 0.25)


def pool(path: NoisePath, seed: int = 0, **options: Any) -> Pool:
    plain: dict[str, Any] = {
        "size": 12, "steps": (3, 6), "negative_prompt_prob": 0.5, "path": path}  # fmt: skip
    return Pool(PROMPTS, SHAPE, SCALES, generator=seeded(seed), **{**plain, **options})


def trajectories(schedule: NoisePath, seed: int = 0, **options: Any) -> CFGTrajectories:
    student = options.pop("student", None)
    return CFGTrajectories(teacher, schedule, pool(schedule, seed, **options), student)


def noised(schedule: NoisePath, prompts: int) -> NoisedImages:
    clean = torch.randn(7, *SHAPE, generator=seeded(2))
    prompt = torch.arange(7) % prompts
    return NoisedImages(teacher, schedule, clean, prompt, SCALES, prompts, 0.5)


def test_the_teachers_predictions_are_kept(schedule: NoisePath) -> None:
    samples = trajectories(schedule, student=constant, on_policy_ratio=1.0).draw(6, seeded(1))
    n, c = teacher(samples.latents, samples.time, samples.prompt, samples.negative)
    assert torch.equal(samples.unconditional, n)
    assert torch.equal(samples.untrained, c)


def test_noised_images_lie_on_the_forward_process(schedule: NoisePath) -> None:
    source = noised(schedule, 7)
    samples = source.draw(256, seeded(3))
    alpha, sigma = (x.reshape(-1, 1, 1, 1) for x in schedule.alpha_sigma(samples.time))
    noise = (samples.latents - alpha * source.latents[samples.prompt]) / sigma
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert samples.time.min() < 0.1
    assert samples.time.max() > 0.9
    assert SCALES[0] <= samples.guidance_scale.min()
    assert samples.guidance_scale.max() <= SCALES[1]


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_drawn_latents_take_one_step(schedule: NoisePath, ratio: float) -> None:
    source = trajectories(schedule, steps=(4, 4), student=constant, on_policy_ratio=ratio)
    before = source.pool.latents.clone()
    samples = source.draw(5, seeded(1))
    slots = torch.randperm(12, generator=seeded(1))[:5]
    grid = schedule.grid(4)
    assert torch.equal(samples.latents, before[slots])
    assert torch.equal(samples.time, grid[0].expand(5))
    own = constant(samples)
    prediction = own
    if not ratio:
        prediction = teacher.guided(
            samples.unconditional, samples.conditional, samples.guidance_scale
        )
    expected = schedule.step(before[slots], prediction, samples.time, grid[1].expand(5))
    assert torch.equal(source.pool.latents[slots], expected)
    rest = torch.tensor([i for i in range(12) if i not in slots.tolist()])
    assert torch.equal(source.pool.latents[rest], before[rest])


def test_a_latent_is_sampled_to_its_end_and_a_new_one_begins(schedule: NoisePath) -> None:
    source = trajectories(schedule, size=1, steps=(5, 5))
    generator = seeded(1)
    first = [source.draw(1, generator) for _ in range(5)]
    assert [float(s.time) for s in first] == schedule.grid(5)[:-1].tolist()
    assert len({float(s.guidance_scale) for s in first}) == 1
    assert len({int(s.prompt) for s in first}) == 1
    second = source.draw(1, generator)
    assert float(second.time) == float(schedule.grid(5)[0])
    assert float(second.guidance_scale) != float(first[0].guidance_scale)
    assert second.latents.std() == pytest.approx(1, abs=0.3)


def test_the_pool_spreads_over_times_prompts_and_scales(schedule: NoisePath) -> None:
    source = trajectories(schedule, size=32)
    generator = seeded(1)
    drawn = [source.draw(8, generator) for _ in range(60)]
    times = torch.cat([s.time for s in drawn])
    scales = torch.cat([s.guidance_scale for s in drawn])
    grids = {float(t) for n in range(1, 7) for t in schedule.grid(n)[:-1]}
    assert set(times[-240:].tolist()) <= grids
    assert len(times.unique()) > 10
    assert set(torch.cat([s.prompt for s in drawn]).tolist()) == set(range(PROMPTS))
    assert SCALES[0] <= scales.min()
    assert scales.max() <= SCALES[1]
    assert len(scales.unique()) > 50


@pytest.mark.parametrize("prob", [0.0, 0.3, 1.0])
def test_ratios_and_probabilities_hold_and_move_no_other_draw(
    schedule: NoisePath, prob: float
) -> None:
    """A run without negative prompts is repeated bit for bit."""
    made = pool(schedule, size=2000, negative_prompt_prob=prob, on_policy_ratio=prob)
    assert (made.negative != NULL).float().mean() == pytest.approx(prob, abs=0.05)
    assert made.on_policy.float().mean() == pytest.approx(prob, abs=0.05)
    assert set(made.negative.tolist()) - {NULL} == (set(range(PROMPTS)) if prob else set())
    without = pool(schedule, size=2000, negative_prompt_prob=0.0, on_policy_ratio=prob)
    for name in ("latents", "length", "prompt", "scale", "on_policy"):
        assert torch.equal(getattr(made, name), getattr(without, name))


@pytest.mark.parametrize("steps", [1, 4, 48, 96])
def test_a_finer_grid_keeps_the_points_of_the_coarse_one(schedule: NoisePath, steps: int) -> None:
    """Rounded on their own, the two may differ there."""
    made = pool(schedule, size=1, steps=(steps, steps))
    slot = torch.zeros(1, dtype=torch.long)
    coarse, fine = schedule.grid(steps), schedule.grid(2 * steps)
    for i in range(steps):
        times = [float(made.time(slot, ahead, finer=2)) for ahead in (0, 1, 2)]
        assert times == [float(coarse[i]), float(fine[2 * i + 1]), float(coarse[i + 1])]
        assert times[0] > times[1] > times[2]
        made.advance(slot, made.latents[slot], seeded())


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_goal_is_where_two_steps_lead(schedule: NoisePath, ratio: float) -> None:
    made = pool(schedule, steps=(4, 4), on_policy_ratio=ratio)
    source = HalvedTrajectories(
        guided, teacher, schedule, made, lambda samples: torch.zeros_like(samples.latents)
    )
    before, slots = made.latents.clone(), torch.randperm(12, generator=seeded(1))[:6]
    samples = source.draw(6, seeded(1))
    fine = [t.expand(6) for t in schedule.grid(8)]
    z, w = before[slots], samples.guidance_scale
    texts = samples.prompt, samples.negative
    halfway = schedule.step(z, guided(z, fine[0], *texts, w), fine[0], fine[1])
    goal = schedule.step(halfway, guided(halfway, fine[1], *texts, w), fine[1], fine[2])
    assert torch.equal(samples.latents, z)
    assert torch.equal(samples.time, fine[0])
    assert torch.equal(samples.untrained, guided(z, fine[0], *texts, w))
    reached = schedule.step(z, samples.goal, fine[0], fine[2])
    torch.testing.assert_close(reached, goal, atol=1e-4, rtol=1e-4)
    led = schedule.step(z, torch.zeros_like(z), fine[0], fine[2]) if ratio else goal
    torch.testing.assert_close(made.latents[slots], led, atol=1e-5, rtol=1e-5)


def test_a_whole_trajectory_of_the_teacher_is_followed(schedule: NoisePath) -> None:
    """From noise to the end, one step of the student for two of the teacher."""
    made, generator = pool(schedule, size=1, steps=(3, 3)), seeded(0)
    source = HalvedTrajectories(guided, teacher, schedule, made)
    z, w = made.latents.clone(), made.scale.clone()
    texts = made.prompt.clone(), made.negative.clone()
    last = [source.draw(1, generator) for _ in range(3)][-1]
    for t, to in pairwise(schedule.grid(6)):
        z = schedule.step(z, guided(z, t.expand(1), *texts, w), t.expand(1), to.expand(1))
    end = schedule.grid(6)[-1:]
    reached = schedule.step(last.latents, last.goal, last.time, end)
    torch.testing.assert_close(reached, z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["noised", "trajectory", "on_policy"])
@pytest.mark.parametrize("saved_after", [0, 3, 10])
def test_a_resumed_replay_draws_what_an_uninterrupted_one_does(
    schedule: NoisePath, name: str, saved_after: int
) -> None:
    def source(seed: int) -> Source:
        if name == "noised":
            return noised(schedule, PROMPTS)
        ratio = 0.5 if name == "on_policy" else 0.0
        return trajectories(schedule, seed, student=constant, on_policy_ratio=ratio)

    def draw(replay: Replay, steps: range) -> list[Any]:
        return [replay.draw(4, step, seeded(100 + step)) for step in steps]

    replay = Replay(source(9), capacity=16, reuse=3)
    draw(replay, range(saved_after))
    saved = {k: v.clone() for k, v in replay.tensors().items()}
    expected = draw(replay, range(saved_after, saved_after + 8))
    again = Replay(source(21), capacity=16, reuse=3)
    draw(again, range(1))  # loading replaces it
    kept = {k: v.clone() for k, v in saved.items()}
    again.load(saved)
    found = draw(again, range(saved_after, saved_after + 8))
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))
    assert all(torch.equal(v, saved[k]) for k, v in kept.items())  # loaded as a copy
