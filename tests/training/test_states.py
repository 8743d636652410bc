"""Where training states come from, and that they resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pilotfish.conditioning import NULL
from pilotfish.guidance import classifier_free_guidance
from pilotfish.noise import NoisePath, sampling_timesteps
from pilotfish.training.checkpoints import load_checkpoint, save_checkpoint
from pilotfish.training.guidance_states import GuidanceStates, NoisedPictures, RollingTrajectories
from pilotfish.training.pool import Pool
from pilotfish.training.states import Replay, Source, States

SHAPE = (4, 8, 8)
SCALES = (1.5, 6.0)
PROMPTS = 5


def teacher(
    z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor, negative: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two predictions that differ by prompts and time."""
    tone = (prompt + 1).reshape(-1, 1, 1, 1) * 0.01 + t.reshape(-1, 1, 1, 1) * 1e-4
    return 0.9 * z + (negative + 1).reshape(-1, 1, 1, 1) * 0.02, 0.9 * z + tone


def student(
    z: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor, negative: torch.Tensor,
    w: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    return torch.full_like(z, 0.25)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rolling(schedule: NoisePath, seed: int = 0, **options: Any) -> RollingTrajectories:
    own = options.pop("student", None)
    plain: dict[str, Any] = {
        "size": 12, "steps": (3, 6), "train_timesteps": 1000, "negative_share": 0.5
    }  # fmt: skip
    pool = Pool(PROMPTS, SHAPE, SCALES, generator=seeded(seed), **{**plain, **options})
    return RollingTrajectories(teacher, schedule, pool, own)


def copied(source: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in source.tensors().items()}


def equal(a: States, b: States) -> bool:
    return all(torch.equal(v, b.tensors()[k]) for k, v in a.tensors().items())


# -- states -----------------------------------------------------------------------------


def test_the_target_is_equation_one(schedule: NoisePath) -> None:
    states = rolling(schedule).draw(6, seeded(1))
    w = torch.linspace(1, 7, 6)
    expected = classifier_free_guidance(states.unconditional, states.conditional, w)
    assert torch.equal(states.target(w), expected)
    assert len(states) == 6


def test_picked_states_keep_together(schedule: NoisePath) -> None:
    states = rolling(schedule).draw(6, seeded(1))
    index = torch.tensor([4, 0, 4])
    picked = states.pick(index)
    assert len(picked) == 3
    assert all(torch.equal(v, states.tensors()[k][index]) for k, v in picked.tensors().items())


# -- noised pictures --------------------------------------------------------------------


def test_noised_pictures_lie_on_the_forward_process(schedule: NoisePath) -> None:
    clean = torch.randn(7, *SHAPE, generator=seeded(2))
    source = NoisedPictures(teacher, schedule, clean, torch.arange(7), SCALES, 7, 0.5)
    states = source.draw(256, seeded(3))
    a = schedule.alphas_cumprod[states.timestep].reshape(-1, 1, 1, 1)
    noise = (states.latents - a.sqrt() * clean[states.prompt]) / (1 - a).sqrt()
    assert noise.mean().abs() < 0.05
    assert noise.std() == pytest.approx(1, abs=0.05)
    assert states.timestep.min() < 100
    assert states.timestep.max() > 900
    assert SCALES[0] <= states.guidance_scale.min()
    assert states.guidance_scale.max() <= SCALES[1]
    n, c = teacher(states.latents, states.timestep, states.prompt, states.negative)
    assert torch.equal(states.unconditional, n)
    assert torch.equal(states.conditional, c)


# -- rolling trajectories ---------------------------------------------------------------


def test_what_is_drawn_takes_one_cfg_step(schedule: NoisePath) -> None:
    source = rolling(schedule, steps=(4, 4))
    before = source.pool.latents.clone()
    states = source.draw(5, seeded(1))
    slots = torch.randperm(12, generator=seeded(1))[:5]
    assert torch.equal(states.latents, before[slots])
    grid = sampling_timesteps(4)
    assert states.timestep.tolist() == [int(grid[0])] * 5
    expected = schedule.ddim_step(
        states.latents,
        states.target(states.guidance_scale),
        states.timestep,
        grid[1].expand(5),
    )
    assert torch.equal(source.pool.latents[slots], expected)
    rest = torch.tensor([i for i in range(12) if i not in slots.tolist()])
    assert torch.equal(source.pool.latents[rest], before[rest])


def test_one_latent_is_sampled_to_its_end_and_a_new_one_begins(schedule: NoisePath) -> None:
    source = rolling(schedule, size=1, steps=(5, 5))
    generator = seeded(1)
    first = [source.draw(1, generator) for _ in range(5)]
    assert [int(s.timestep) for s in first] == sampling_timesteps(5)[:-1].tolist()
    assert len({float(s.guidance_scale) for s in first}) == 1
    assert len({int(s.prompt) for s in first}) == 1
    second = source.draw(1, generator)
    assert int(second.timestep) == 999
    assert float(second.guidance_scale) != float(first[0].guidance_scale)
    assert second.latents.std() == pytest.approx(1, abs=0.3)
    assert not torch.equal(second.latents, first[0].latents)


def test_the_pool_spreads_over_times_prompts_and_scales(schedule: NoisePath) -> None:
    source = rolling(schedule, size=32)
    generator = seeded(1)
    drawn = [source.draw(8, generator) for _ in range(60)]
    times = torch.cat([s.timestep for s in drawn])
    scales = torch.cat([s.guidance_scale for s in drawn])
    grids = {int(t) for n in range(1, 7) for t in sampling_timesteps(n)[:-1]}
    assert set(times[-240:].tolist()) <= grids
    assert len(times.unique()) > 10
    assert set(torch.cat([s.prompt for s in drawn]).tolist()) == set(range(PROMPTS))
    assert SCALES[0] <= scales.min()
    assert scales.max() <= SCALES[1]
    assert len(scales.unique()) > 50
    assert (source.pool.position < source.pool.length).all()


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_student_steps_its_share(schedule: NoisePath, share: float) -> None:
    source = rolling(schedule, steps=(4, 4), student=student, student_share=share)
    before = source.pool.latents.clone()
    states = source.draw(12, seeded(1))
    slots = torch.randperm(12, generator=seeded(1))[:12]
    own = torch.full_like(before[slots], 0.25)
    prediction = own if share else states.target(states.guidance_scale)
    expected = schedule.ddim_step(
        before[slots], prediction, states.timestep, sampling_timesteps(4)[1].expand(12)
    )
    assert torch.equal(source.pool.latents[slots], expected)


def test_the_teachers_answer_is_kept_for_the_students_states(schedule: NoisePath) -> None:
    source = rolling(schedule, student=student, student_share=1.0)
    states = source.draw(12, seeded(1))
    n, c = teacher(states.latents, states.timestep, states.prompt, states.negative)
    assert torch.equal(states.unconditional, n)
    assert torch.equal(states.conditional, c)


def test_a_share_is_a_share(schedule: NoisePath) -> None:
    source = rolling(schedule, size=2000, student=student, student_share=0.3)
    assert source.pool.own.float().mean() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_has_other_prompts_as_negative_prompts(schedule: NoisePath, share: float) -> None:
    pool = rolling(schedule, size=2000, negative_share=share).pool
    assert (pool.negative != NULL).float().mean() == pytest.approx(share, abs=0.05)
    assert set(pool.negative.tolist()) - {NULL} == (set(range(PROMPTS)) if share else set())


def test_a_share_of_negative_prompts_moves_no_other_draw(schedule: NoisePath) -> None:
    """What was trained without them is trained again to the same weights."""
    with_them, without = rolling(schedule).pool, rolling(schedule, negative_share=0.0).pool
    for name in ("latents", "length", "prompt", "scale", "own"):
        assert torch.equal(getattr(with_them, name), getattr(without, name))


@pytest.mark.parametrize("steps", [1, 4, 48, 96])
def test_a_finer_grid_keeps_the_points_of_the_coarse_one(steps: int) -> None:
    """Though the two, rounded on their own, may differ there."""
    pool = Pool(1, SHAPE, SCALES, size=1, steps=(steps, steps), train_timesteps=1000,
                generator=seeded())  # fmt: skip
    slot = torch.zeros(1, dtype=torch.long)
    coarse, fine = sampling_timesteps(steps), sampling_timesteps(2 * steps)
    for i in range(steps):
        times = [int(pool.timestep(slot, ahead, finer=2)) for ahead in (0, 1, 2)]
        assert times == [int(coarse[i]), int(fine[2 * i + 1]), int(coarse[i + 1])]
        assert times[0] > times[1] > times[2]
        pool.put_back(slot, pool.latents[slot], seeded())


# -- replay -----------------------------------------------------------------------------


class Counting:
    """A source of numbered states."""

    kind = GuidanceStates

    def __init__(self) -> None:
        self.next = 0
        self.draws = 0

    def draw(self, n: int, generator: torch.Generator) -> States:
        number = torch.arange(self.next, self.next + n)
        self.next += n
        self.draws += 1
        z = number.reshape(-1, 1, 1, 1).float()
        return GuidanceStates(z, number, number.float(), number, number, z, z)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"next": torch.tensor(self.next)}

    def load(self, tensors: Any) -> None:
        self.next = int(tensors["next"])


def test_new_states_are_made_every_reuse_steps() -> None:
    source = Counting()
    replay = Replay(source, capacity=32, reuse=4)
    replay.draw(8, 1, seeded())
    filled = source.draws
    assert filled == 4
    for step in range(2, 10):
        replay.draw(8, step, seeded(step))
    assert source.draws == filled + 2


def test_the_ring_holds_the_newest() -> None:
    replay = Replay(Counting(), capacity=32, reuse=1)
    for step in range(9):
        replay.draw(8, step, seeded(step))
        assert replay.states is not None
        assert len(replay.states) == 32
    newest = replay.source.next  # type: ignore[attr-defined]
    assert sorted(replay.states.timestep.tolist()) == list(range(newest - 32, newest))


def test_a_ring_smaller_than_a_batch_still_serves() -> None:
    replay = Replay(Counting(), capacity=4, reuse=2)
    assert len(replay.draw(8, 0, seeded())) == 8
    assert len(replay.draw(8, 1, seeded())) == 8


def sources(schedule: NoisePath, seed: int) -> dict[str, Source]:
    clean, prompt = torch.randn(7, *SHAPE, generator=seeded(2)), torch.arange(7) % PROMPTS
    return {
        "noised": NoisedPictures(teacher, schedule, clean, prompt, SCALES, PROMPTS, 0.5),
        "trajectory": rolling(schedule, seed),
        "student": rolling(schedule, seed, student=student, student_share=0.5),
    }


@pytest.mark.parametrize("name", ["noised", "trajectory", "student"])
@pytest.mark.parametrize("saved_after", [0, 3, 10])
def test_a_resumed_replay_draws_what_an_uninterrupted_one_does(
    schedule: NoisePath, tmp_path: Path, name: str, saved_after: int
) -> None:
    def draw(replay: Replay, steps: range) -> list[States]:
        return [replay.draw(4, step, seeded(100 + step)) for step in steps]

    replay = Replay(sources(schedule, 9)[name], capacity=16, reuse=3)
    draw(replay, range(saved_after))
    path = save_checkpoint(tmp_path, saved_after, replay.tensors(), {})
    expected = draw(replay, range(saved_after, saved_after + 8))

    again = Replay(sources(schedule, 21)[name], capacity=16, reuse=3)
    draw(again, range(1))  # whatever it did before, loading forgets it
    again.load(load_checkpoint(path).tensors)
    found = draw(again, range(saved_after, saved_after + 8))
    assert all(equal(a, b) for a, b in zip(expected, found, strict=True))


def test_loading_copies(schedule: NoisePath) -> None:
    """What was loaded must not change when training goes on."""
    source = rolling(schedule)
    kept = copied(source)
    other = rolling(schedule, seed=5)
    other.load(kept)
    other.draw(12, seeded(1))
    assert all(torch.equal(v, source.tensors()[k]) for k, v in kept.items())
