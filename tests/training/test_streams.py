"""Streams: the same run on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from pilotfish.training.config import ConfigError
from pilotfish.training.states import States
from pilotfish.training.streams import Streams, share_out, shared_draws


class Noise:
    """States drawn by the generator alone, counted as they come."""

    kind = States

    def __init__(self, stream: int, host: int) -> None:
        self.stream, self.drawn = stream, 0

    def draw(self, n: int, generator: torch.Generator) -> States:
        timestep = torch.full((n,), self.stream)
        self.drawn += n
        z = torch.randn(n, 1, 2, 2, generator=generator) + self.drawn
        return States(z, timestep, torch.ones(n), timestep, timestep)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"drawn": torch.tensor(self.drawn)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.drawn = int(tensors["drawn"])


def streams(own: range, batch: int) -> Streams:
    return Streams(own, 3, batch=batch, hosts=2, source=Noise, capacity=16, reuse=2)


def scales(states: States, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(len(states), generator=generator)


def equal(a: States, b: States) -> bool:
    return all(torch.equal(v, b.tensors()[k]) for k, v in a.tensors().items())


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_draw_what_one_does(processes: int) -> None:
    alone = streams(share_out(4, 1, 0), 16)
    shares = [streams(share_out(4, processes, i), 16 // processes) for i in range(processes)]
    for tick in range(5):
        states, w = alone.draw(tick % 2, tick, scales)
        parts = [share.draw(tick % 2, tick, scales) for share in shares]
        assert len(states) == 16
        assert equal(states, parts[0][0].joined([part for part, _ in parts[1:]]))
        assert torch.equal(w, torch.cat([part for _, part in parts]))
    assert len(states.timestep.unique()) == 4


def test_streams_and_ticks_draw_differently_and_share_what_is_shared() -> None:
    both = streams(range(2), 8)
    one, w = both.draw(0, 0, scales)
    two, _ = both.draw(0, 1, scales)
    assert not torch.equal(one.latents[:4], one.latents[4:])
    assert not torch.equal(w[:4], w[4:])
    assert not torch.equal(one.latents, two.latents)
    rolls = [torch.rand(1, generator=shared_draws(3, tick)) for tick in (0, 0, 1)]
    assert rolls[0] == rolls[1] != rolls[2]


def test_resumed_on_other_processes_they_go_on() -> None:
    alone = streams(range(2), 8)
    for tick in range(3):
        alone.draw(tick % 2, tick, scales)
    saved = alone.tensors()
    shares = [streams(share_out(2, 2, i), 4) for i in range(2)]
    for share in shares:
        for number in share.rings:
            share.load(number, saved[number])
    for tick in range(3, 6):
        states, _ = alone.draw(tick % 2, tick, scales)
        parts = [share.draw(tick % 2, tick, scales)[0] for share in shares]
        assert equal(states, parts[0].joined(parts[1:]))


def test_uneven_shares_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of the 2 processes"):
        share_out(3, 2, 0)
    with pytest.raises(ConfigError, match="up to 1023"):
        share_out(2048, 2, 0)
    with pytest.raises(ConfigError, match="multiple of the 3 streams"):
        streams(range(3), 8)
