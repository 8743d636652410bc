"""The replay ring and the streams: exact on resume, and on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from pilotfish.training.config import ConfigError
from pilotfish.training.samples import (
    GuidanceSamples,
    Replay,
    Streams,
    TrainingSamples,
    own_streams,
    shared_generator,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Numbered:
    """A source of numbered samples with random latents."""

    samples_type = GuidanceSamples

    def __init__(self, stream: int = 0, model: int = 0) -> None:
        self.stream, self.next, self.draws = stream, 0, 0

    def draw(self, n: int, generator: torch.Generator) -> TrainingSamples:
        number = torch.arange(self.next, self.next + n)
        self.next += n
        self.draws += 1
        z = torch.randn(n, 1, 2, 2, generator=generator) + self.next
        stream = torch.full((n,), self.stream)
        scale, none = number.float(), torch.zeros(n)
        return GuidanceSamples(
            z, scale, scale, stream, stream, none, z, z, z, z, none, none, unconditional=z,
            conditional=z,
        )  # fmt: skip

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"next": torch.tensor(self.next)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.next = int(tensors["next"])


def equal(a: TrainingSamples, b: TrainingSamples) -> bool:
    return all(torch.equal(v, b.tensors()[k]) for k, v in a.tensors().items())


def test_picked_samples_stay_together() -> None:
    samples = Numbered().draw(6, seeded())
    index = torch.tensor([4, 0, 4])
    picked = samples.pick(index)
    assert len(picked) == 3
    assert all(torch.equal(v, samples.tensors()[k][index]) for k, v in picked.tensors().items())


def test_new_samples_are_made_every_reuse_steps() -> None:
    source = Numbered()
    replay = Replay(source, capacity=32, reuse=4)
    replay.draw(8, 1, seeded())
    filled = source.draws
    assert filled == 4
    for step in range(2, 10):
        replay.draw(8, step, seeded(step))
    assert source.draws == filled + 2


def test_the_ring_holds_the_newest() -> None:
    source = Numbered()
    replay = Replay(source, capacity=32, reuse=1)
    for step in range(9):
        replay.draw(8, step, seeded(step))
    assert replay.ring is not None
    assert sorted(replay.ring.time.tolist()) == list(range(source.next - 32, source.next))


def test_a_ring_smaller_than_a_batch_still_serves() -> None:
    replay = Replay(Numbered(), capacity=4, reuse=2)
    assert len(replay.draw(8, 0, seeded())) == 8
    assert len(replay.draw(8, 1, seeded())) == 8


def streams(numbers: range, batch: int) -> Streams:
    return Streams(numbers, 3, batch=batch, sources=2, source=Numbered, capacity=16, reuse=2)


def scales(samples: TrainingSamples, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(len(samples), generator=generator)


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_draw_what_one_does(processes: int) -> None:
    alone = streams(own_streams(4, 1, 0), 16)
    shares = [streams(own_streams(4, processes, i), 16 // processes) for i in range(processes)]
    for tick in range(5):
        samples, w = alone.draw(tick % 2, tick, scales)
        parts = [share.draw(tick % 2, tick, scales) for share in shares]
        assert len(samples) == 16
        assert equal(samples, TrainingSamples.cat([part for part, _ in parts]))
        assert torch.equal(w, torch.cat([part for _, part in parts]))
    assert len(samples.prompt.unique()) == 4


def test_streams_and_ticks_draw_differently_and_share_what_is_shared() -> None:
    both = streams(range(2), 8)
    one, w = both.draw(0, 0, scales)
    two, _ = both.draw(0, 1, scales)
    assert not torch.equal(one.latents[:4], one.latents[4:])
    assert not torch.equal(w[:4], w[4:])
    assert not torch.equal(one.latents, two.latents)
    rolls = [torch.rand(1, generator=shared_generator(3, tick)) for tick in (0, 0, 1)]
    assert rolls[0] == rolls[1] != rolls[2]


def test_resumed_on_other_processes_they_continue() -> None:
    alone = streams(range(2), 8)
    for tick in range(3):
        alone.draw(tick % 2, tick, scales)
    saved = alone.tensors()
    shares = [streams(own_streams(2, 2, i), 4) for i in range(2)]
    for share in shares:
        for number in share.rings:
            share.load(number, saved[number])
    for tick in range(3, 6):
        samples, _ = alone.draw(tick % 2, tick, scales)
        parts = [share.draw(tick % 2, tick, scales)[0] for share in shares]
        assert equal(samples, TrainingSamples.cat(parts))


def test_uneven_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of the 2 processes"):
        own_streams(3, 2, 0)
    with pytest.raises(ConfigError, match="at most 1023"):
        own_streams(2048, 2, 0)
    with pytest.raises(ConfigError, match="multiple of the 3 streams"):
        streams(range(3), 8)
