"""Batches of training samples, the replay ring that reuses them, and the random streams.

A stream has a source and a ring for every model and size of images, and a generator for every tick
(one micro-batch) that is seeded by (seed, stream, tick). The streams are divided among the
processes; the process that draws from a stream does not change its samples. So a resumed run
repeats the uninterrupted one, and two processes repeat one process with both streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, Self

import torch

from pilotfish.interface import Refresh
from pilotfish.training.config import ConfigError

MAX_STREAMS = 1023
"""Most streams of a run; the last number seeds the draws that all streams share."""
BEFORE_TRAINING = 10**9 - 1
"""The tick of draws before the first tick."""

Tensors = dict[str, torch.Tensor]


REFRESH_FIELDS = (
    "refresh_time", "difference", "refresh_conditional", "refresh_latents", "slope", "refresh_gap",
    "known",
)  # fmt: skip
"""Fields of :class:`TrainingSamples` that make a :class:`~pilotfish.interface.Refresh`, in its
order."""


@dataclass(frozen=True)
class TrainingSamples:
    """A batch of noisy latents to train on.

    Attributes:
        latents: (N, C, h, w).
        time: (N,) normalised.
        guidance_scale: (N,) the scale of the trajectory.
        prompt: (N,) int64, index into the prompts.
        negative: (N,) int64, index of the null or negative prompt.
        refresh_time: (N,) see :class:`~pilotfish.interface.Refresh`, as the next six.
        difference: (N, C, h, w).
        refresh_conditional: (N, C, h, w).
        refresh_latents: (N, C, h, w).
        slope: (N, C, h, w).
        refresh_gap: (N,).
        known: (N,).
        any_scale: whether the target is known at every scale, or at ``guidance_scale`` alone.
    """

    any_scale: ClassVar[bool] = False

    latents: torch.Tensor
    time: torch.Tensor
    guidance_scale: torch.Tensor
    prompt: torch.Tensor
    negative: torch.Tensor
    refresh_time: torch.Tensor
    difference: torch.Tensor
    refresh_conditional: torch.Tensor
    refresh_latents: torch.Tensor
    slope: torch.Tensor
    refresh_gap: torch.Tensor
    known: torch.Tensor

    def __len__(self) -> int:
        return len(self.time)

    @property
    def refresh(self) -> Refresh:
        """What the last refresh of each trajectory found."""
        return Refresh(*(getattr(self, name) for name in REFRESH_FIELDS))

    @property
    def untrained(self) -> torch.Tensor:
        """(N, C, h, w), the prediction of an untrained student."""
        raise NotImplementedError

    def tensors(self) -> Tensors:
        """Every field by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The samples with every tensor changed."""
        return type(self)(**{k: change(v) for k, v in self.tensors().items()})

    def to(self, device: torch.device) -> Self:
        """The samples on a device. Pools and rings are on the CPU."""
        return self.map(lambda value: value.to(device))

    def pick(self, index: torch.Tensor) -> Self:
        """The samples at ``index``."""
        return self.map(lambda value: value[index])

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Several batches as one."""
        first, every = parts[0], [part.tensors() for part in parts]
        return type(first)(**{k: torch.cat([part[k] for part in every]) for k in every[0]})


@dataclass(frozen=True)
class GuidanceSamples(TrainingSamples):
    """Samples of stage 1, with the teacher's two predictions. CFG is computed from them, so the
    target is known at every scale.

    Attributes:
        unconditional: (N, C, h, w) the base's prediction for the null or negative prompt.
        conditional: (N, C, h, w) the base's prediction for the prompt.
    """

    any_scale: ClassVar[bool] = True

    unconditional: torch.Tensor
    conditional: torch.Tensor

    @property
    def untrained(self) -> torch.Tensor:
        """A new guide adds nothing to the conditional prediction."""
        return self.conditional


@dataclass(frozen=True)
class TrackingSamples(GuidanceSamples):
    """Samples of stage 1 on the student's trajectories.

    Attributes:
        goal: (N, C, h, w) the prediction that the student is trained on.
    """

    any_scale: ClassVar[bool] = False

    goal: torch.Tensor


@dataclass(frozen=True)
class StepSamples(TrainingSamples):
    """Samples of stage 2, with the prediction whose one step equals two steps of the teacher, or
    leads nearer to its trajectory.

    Attributes:
        goal: (N, C, h, w) that prediction.
        first: (N, C, h, w) the teacher's own prediction, with which the student starts.
        due: (N,) bool, whether the student runs both passes in this step.
    """

    goal: torch.Tensor
    first: torch.Tensor
    due: torch.Tensor

    @property
    def untrained(self) -> torch.Tensor:
        """A new student predicts what its teacher does."""
        return self.first


class Source(Protocol):
    """A source of samples. ``tensors`` holds its whole state, so that it resumes exactly."""

    @property
    def samples_type(self) -> type[TrainingSamples]:
        """The class of the samples."""
        ...

    def draw(self, n: int, generator: torch.Generator) -> TrainingSamples:
        """The next ``n`` samples."""
        ...

    def tensors(self) -> Tensors:
        """The state to save."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore it."""
        ...


class Replay:
    """A ring of recent samples, so that the teacher's predictions serve many updates.

    Args:
        source: makes new samples.
        capacity: samples kept.
        reuse: how often a sample is used on average while it is kept.
    """

    def __init__(self, source: Source, capacity: int, reuse: int) -> None:
        self.source, self.capacity, self.reuse = source, capacity, reuse
        self.ring: TrainingSamples | None = None
        self.written = 0

    def draw(self, n: int, step: int, generator: torch.Generator) -> TrainingSamples:
        """``n`` samples for training step ``step``; new ones are made every ``reuse`` steps.

        The ring is filled before the first step, so that trajectories cover all timesteps by then.
        """
        ring = self.ring = self._filled(n, generator)
        if step % self.reuse == 0:
            new = self._new(n, generator)
            where = (self.written + torch.arange(len(new))) % len(ring)
            for name, value in new.tensors().items():
                getattr(ring, name)[where] = value
            self.written += len(new)
        return ring.pick(torch.randint(len(ring), (n,), generator=generator))

    def _filled(self, n: int, generator: torch.Generator) -> TrainingSamples:
        """The ring with as many samples as it can hold, in batches of ``n``."""
        parts = [] if self.ring is None else [self.ring]
        held = sum(map(len, parts))
        while not parts or held + n <= self.capacity:
            parts.append(self._new(n, generator))
            held += n
            self.written += n
        # of one part as well: fields of a source's samples may be one tensor, those of a ring not
        return TrainingSamples.cat(parts)

    def _new(self, n: int, generator: torch.Generator) -> TrainingSamples:
        # one memory layout for all: kernels round differently for other strides, and a sample read
        # from a checkpoint is contiguous
        return self.source.draw(n, generator).map(torch.Tensor.contiguous)

    def tensors(self) -> Tensors:
        """Source and ring, for a checkpoint."""
        kept = {f"source.{k}": v for k, v in self.source.tensors().items()}
        if self.ring is not None:
            kept |= {f"ring.{k}": v for k, v in self.ring.tensors().items()}
        return kept | {"written": torch.tensor(self.written)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore the result of :meth:`tensors`."""
        self.source.load(below("source", tensors))
        ring = {k: v.clone() for k, v in below("ring", tensors).items()}
        self.ring = self.source.samples_type(**ring) if ring else None
        self.written = int(tensors["written"])


class Streams:
    """The streams of one process.

    Args:
        numbers: of the streams.
        seed: of the run.
        batch: samples of a tick, of all streams of the process together.
        sources: how many sources each has: a model and a size of images.
        source: makes a source, by the numbers of stream and source.
        capacity: of the rings of a stream, for all sources together.
        reuse: see :class:`Replay`.

    Raises:
        ConfigError: the batch cannot be divided evenly.
    """

    def __init__(
        self, numbers: Iterable[int], seed: int, *, batch: int, sources: int,
        source: Callable[[int, int], Source], capacity: int, reuse: int,
    ) -> None:  # fmt: skip
        self.seed = seed
        self.rings = {
            i: [Replay(source(i, k), capacity // sources, reuse) for k in range(sources)]
            for i in numbers
        }
        if batch % len(self.rings):
            raise ConfigError(
                f"train_batch_size must be a multiple of the {len(self.rings)} streams of a "
                f"process, not {batch}"
            )
        self.batch = batch // len(self.rings)

    def draw(
        self, source: int, tick: int,
        draw_scales: Callable[[TrainingSamples, torch.Generator], torch.Tensor],
    ) -> tuple[TrainingSamples, torch.Tensor]:  # fmt: skip
        """The samples of a tick from one source, and the scales (N,) drawn for them."""
        drawn, w = [], []
        for stream, rings in self.rings.items():
            random = generator(self.seed, stream, tick)
            drawn.append(rings[source].draw(self.batch, tick, random))
            w.append(draw_scales(drawn[-1], random))
        return TrainingSamples.cat(drawn) if len(drawn) > 1 else drawn[0], torch.cat(w)

    def tensors(self) -> dict[int, Tensors]:
        """The state to save, by stream."""
        return {
            stream: {
                f"{source}.{name}": tensor
                for source, ring in enumerate(rings)
                for name, tensor in ring.tensors().items()
            }
            for stream, rings in self.rings.items()
        }

    def load(self, stream: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Restore a stream from the state of any stream."""
        for source, ring in enumerate(self.rings[stream]):
            ring.load(below(str(source), tensors))


def generator(seed: int, stream: int, tick: int) -> torch.Generator:
    """The generator of one tick of one stream."""
    return torch.Generator().manual_seed((seed * (MAX_STREAMS + 1) + stream) * 10**9 + tick)


def shared_generator(seed: int, tick: int) -> torch.Generator:
    """The generator of draws that all streams share in a tick."""
    return generator(seed, MAX_STREAMS, tick)


def own_streams(streams: int, processes: int, process: int) -> range:
    """The streams of one process.

    Raises:
        ConfigError: they cannot be divided evenly.
    """
    if not 1 <= streams <= MAX_STREAMS or streams % processes:
        raise ConfigError(
            f"streams must be a multiple of the {processes} processes, at most {MAX_STREAMS}, "
            f"not {streams}"
        )
    each = streams // processes
    return range(process * each, (process + 1) * each)


def below(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """The tensors whose names start with ``prefix.``, by the rest of their names."""
    start = f"{prefix}."
    return {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
