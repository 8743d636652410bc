"""Refreshes in training: what the last step with both passes found goes with every sample."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from pilotfish.noise import NoisePath
from pilotfish.training.pool import Pool
from pilotfish.training.samples import StepSamples, TrackingSamples, TrainingSamples
from pilotfish.training.stages import freshness_weight
from pilotfish.training.trajectories import (
    BACK,
    CFGTrajectories,
    HalvedTrajectories,
    TrackedTrajectories,
)
from tests.training.test_samples import seeded
from tests.training.test_trajectories import constant, guided, pool, teacher


def followed(source: Any, steps: int) -> list[TrainingSamples]:
    """The samples of the one latent of a pool, from noise on."""
    generator = seeded(1)
    return [source.draw(1, generator) for _ in range(steps)]


def one(schedule: NoisePath, steps: int, **options: Any) -> Pool:
    return pool(schedule, size=1, steps=(steps, steps), **{"refresh_prob": 1.0, **options})


def test_a_sample_knows_the_last_refreshes_of_its_trajectory(schedule: NoisePath) -> None:
    of_one, of_two = 0, 0
    for seed in range(5):
        samples = followed(CFGTrajectories(teacher, schedule, one(schedule, 9, seed=seed)), 9)
        times = {float(s.time): s for s in samples}
        assert not samples[0].known.any()
        for sample in (s for s in samples if s.known.all()):
            refresh, then = sample.refresh, times[float(sample.refresh_time)]
            assert then.time > sample.time
            assert torch.equal(refresh.latents, then.latents)
            assert torch.equal(refresh.conditional, then.conditional)
            assert torch.equal(refresh.difference, then.conditional - then.unconditional)
            if not then.known.all():
                assert not refresh.slope.any()
                of_one += 1
                continue
            assert torch.equal(refresh.gap, then.refresh_time - refresh.time)
            back = refresh.difference + refresh.change(then.refresh_time)
            torch.testing.assert_close(back, then.difference, rtol=1e-4, atol=1e-5)
            of_two += 1
    assert min(of_one, of_two) > 3


def test_a_new_trajectory_knows_nothing_of_the_one_before(schedule: NoisePath) -> None:
    made = one(schedule, 3)
    source, generator = CFGTrajectories(teacher, schedule, made), seeded(1)
    for _ in range(8):
        drawn = [source.draw(1, generator) for _ in range(3)]
        assert not drawn[0].known.any()
        assert not drawn[0].difference.any()
        assert not drawn[0].slope.any()


@pytest.mark.parametrize("prob", [0.0, 0.4, 1.0])
def test_so_many_trajectories_have_refreshes(schedule: NoisePath, prob: float) -> None:
    made = pool(schedule, size=2000, steps=(12, 12), refresh_prob=prob)
    assert (made.gap > 0).float().mean() == pytest.approx(prob, abs=0.04)


@pytest.mark.parametrize("prob", [0.3, 1.0])
def test_so_many_of_them_begin_with_their_first_step(schedule: NoisePath, prob: float) -> None:
    made = pool(schedule, size=2000, steps=(24, 24), refresh_prob=0.6, first_step_refresh_prob=prob)
    some, first = made.gap > 0, made.due == 0
    assert not first[~some].any()
    assert first[some].float().mean() == pytest.approx(prob + (1 - prob) * 0.1, abs=0.08)


def test_at_a_refresh_a_student_takes_the_step_of_cfg(schedule: NoisePath) -> None:
    made = one(schedule, 8, on_policy_ratio=1.0)
    source, generator = CFGTrajectories(teacher, schedule, made, constant), seeded(1)
    slot, seen = torch.zeros(1, dtype=torch.long), set()
    for step in range(8):
        due = bool(made.is_due(slot))
        sample = source.draw(1, generator)
        if step == 7:  # the pool has begun anew
            break
        cfg = teacher.guided(sample.unconditional, sample.conditional, sample.guidance_scale)
        prediction = cfg if due else constant(sample)
        to = schedule.grid(8)[step + 1].expand(1)
        assert torch.equal(made.latents, schedule.step(sample.latents, prediction, sample.time, to))
        seen.add(due)
    assert seen == {True, False}


def test_who_predicts_what_cfg_does_stays_on_its_trajectory(schedule: NoisePath) -> None:
    def cfg(samples: TrainingSamples) -> torch.Tensor:
        both = teacher(samples.latents, samples.time, samples.prompt, samples.negative)
        return teacher.guided(*both, samples.guidance_scale)

    made = one(schedule, 6)
    for sample in followed(TrackedTrajectories(teacher, schedule, made, cfg), 6):
        assert isinstance(sample, TrackingSamples)
        torch.testing.assert_close(sample.goal, cfg(sample), atol=1e-4, rtol=1e-4)


def test_who_has_left_it_is_led_back(schedule: NoisePath) -> None:
    made = one(schedule, 6, refresh_prob=0.0)
    source = TrackedTrajectories(teacher, schedule, made, constant)
    first, second = followed(source, 2)
    assert isinstance(second, TrackingSamples)
    both = teacher(second.latents, second.time, second.prompt, second.negative)
    assert torch.equal(torch.stack(both), torch.stack([second.unconditional, second.conditional]))
    cfg = teacher.guided(*both, second.guidance_scale)
    to = schedule.grid(6)[2].expand(1)
    teachers, own = made.teacher_latents, second.latents
    assert not torch.allclose(first.latents, own)
    far = (schedule.step(own, cfg, second.time, to) - teachers).norm()
    near = (schedule.step(own, second.goal, second.time, to) - teachers).norm()
    torch.testing.assert_close(near, (1 - BACK) * far, rtol=1e-3, atol=1e-5)


def test_a_student_of_few_steps_that_has_left_it_is_led_back(schedule: NoisePath) -> None:
    made, generator = one(schedule, 4, refresh_prob=0.0, on_policy_ratio=1.0), seeded(1)
    source = HalvedTrajectories(guided, teacher, schedule, made, constant)
    texts = made.prompt.clone(), made.negative.clone(), made.scale.clone()

    def two_steps(z: torch.Tensor, step: int) -> torch.Tensor:
        for t, to in pairwise(schedule.grid(8)[2 * step : 2 * step + 3, None]):
            z = schedule.step(z, guided(z, t, *texts), t, to)
        return z

    theirs = made.latents.clone()
    for step in range(3):
        sample = source.draw(1, generator)
        assert isinstance(sample, StepSamples)
        theirs = two_steps(theirs, step)
        torch.testing.assert_close(made.teacher_latents, theirs, atol=1e-4, rtol=1e-4)
        to = schedule.grid(4)[step + 1].expand(1)
        near = (schedule.step(sample.latents, sample.goal, sample.time, to) - theirs).norm()
        far = (two_steps(sample.latents, step) - theirs).norm()
        assert near < 0.9 * far if step else near < 1e-4
    source.draw(1, generator)
    assert torch.equal(made.teacher_latents, made.latents), "both begin anew from the same noise"


def test_a_student_of_few_steps_is_told_where_it_runs_both_passes(schedule: NoisePath) -> None:
    calls: list[bool] = []

    def student(samples: TrainingSamples) -> torch.Tensor:
        assert isinstance(samples, StepSamples)
        calls.append(bool(samples.due))
        return torch.zeros_like(samples.latents)

    made = one(schedule, 8, on_policy_ratio=1.0)
    slot, generator = torch.zeros(1, dtype=torch.long), seeded(1)
    source = HalvedTrajectories(guided, teacher, schedule, made, student)
    for _ in range(8):
        due = bool(made.is_due(slot))
        sample = source.draw(1, generator)
        assert isinstance(sample, StepSamples)
        assert calls[-1] == bool(sample.due) == due
    assert set(calls) == {True, False}


def test_a_fresh_difference_weighs_more_and_none_weighs_one(schedule: NoisePath) -> None:
    made = pool(schedule, size=64, steps=(12, 12), refresh_prob=1.0)
    source, generator = CFGTrajectories(teacher, schedule, made), seeded(1)
    for _ in range(5):
        samples = source.draw(64, generator)
    now = samples.conditional - samples.unconditional
    weight = freshness_weight(samples.refresh, now)
    assert weight[samples.known == 0].eq(1).all()
    fresh = freshness_weight(samples.refresh, samples.difference)[samples.known == 1]
    assert (fresh >= weight[samples.known == 1]).all()
    assert (weight[samples.known == 1] < fresh).any()
