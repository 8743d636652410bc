"""Streams of training states: what makes a run the same on any number of processes.

A stream has pools and rings of its own for every host, and a generator of its own for every
tick (one micro-batch), seeded by (seed, stream, tick). The streams of a run are shared out
among its processes; which process draws from one makes no difference to what it gives. So a
resumed run does what an uninterrupted one would have done, and two processes do what one does
with both streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from pilotfish.training.config import ConfigError
from pilotfish.training.states import Replay, Source, States

LIMIT = 1023
"""Streams that a run can have; the last number is that of draws which all of them share."""
FIRST = 10**9 - 1
"""The tick of what is drawn before the first."""


def generator(seed: int, stream: int, tick: int) -> torch.Generator:
    """The randomness of one tick of one stream."""
    return torch.Generator().manual_seed((seed * (LIMIT + 1) + stream) * 10**9 + tick)


def shared_draws(seed: int, tick: int) -> torch.Generator:
    """The randomness of one tick in which all streams do the same."""
    return generator(seed, LIMIT, tick)


def share_out(streams: int, processes: int, process: int) -> range:
    """The streams of one process.

    Raises:
        ConfigError: they cannot be shared out evenly.
    """
    if not 1 <= streams <= LIMIT or streams % processes:
        raise ConfigError(
            f"streams must be a multiple of the {processes} processes, up to {LIMIT}, not {streams}"
        )
    each = streams // processes
    return range(process * each, (process + 1) * each)


class Streams:
    """The streams of one process.

    Args:
        own: their numbers.
        seed: of the run.
        batch: states in a tick, of all of them together.
        hosts: on which the states are made; each has its own.
        source: makes a stream's source of states for one host, by the numbers of both.
        capacity: of the ring of a stream, for all hosts together.
        reuse: see :class:`~pilotfish.training.states.Replay`.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """

    def __init__(
        self, own: Iterable[int], seed: int, *, batch: int, hosts: int,
        source: Callable[[int, int], Source], capacity: int, reuse: int,
    ) -> None:  # fmt: skip
        self.seed = seed
        self.rings = {
            i: [Replay(source(i, host), capacity // hosts, reuse) for host in range(hosts)]
            for i in own
        }
        if batch % len(self.rings):
            raise ConfigError(
                f"train_batch_size must be a multiple of the {len(self.rings)} streams of a "
                f"process, not {batch}"
            )
        self.each = batch // len(self.rings)

    def draw(
        self, host: int, tick: int, scales: Callable[[States, torch.Generator], torch.Tensor]
    ) -> tuple[States, torch.Tensor]:
        """The states of a tick on one host, and the scales (N,) that ``scales`` draws for them."""
        drawn, w = [], []
        for stream, rings in self.rings.items():
            own = generator(self.seed, stream, tick)
            drawn.append(rings[host].draw(self.each, tick, own))
            w.append(scales(drawn[-1], own))
        return drawn[0].joined(drawn[1:]), torch.cat(w)

    def tensors(self) -> dict[int, dict[str, torch.Tensor]]:
        """What must be saved, by stream."""
        return {
            stream: {
                f"{host}.{name}": tensor
                for host, ring in enumerate(rings)
                for name, tensor in ring.tensors().items()
            }
            for stream, rings in self.rings.items()
        }

    def load(self, stream: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`tensors` gave of a stream, this or another."""
        for host, ring in enumerate(self.rings[stream]):
            start = f"{host}."
            ring.load({k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)})
