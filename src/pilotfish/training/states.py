"""A batch of training states, the source it comes from, and the ring between source and
training.

What a state is trained towards depends on the stage: :mod:`pilotfish.training.guidance_states`
and :mod:`pilotfish.training.step_states` each add it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, Self

import torch

_WHOLE = {"timestep", "prompt", "negative", "written"}
"""What of a ring is in whole numbers."""
# (latents, timestep, prompt, negative prompt) -> the base's (unconditional, conditional)
# predictions; texts are given by their index
TwoPasses = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]
]
# (latents, timestep, prompt, negative prompt, guidance scale) -> a guided prediction
Guided = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]


@dataclass(frozen=True)
class States:
    """A batch of training states.

    Attributes:
        latents: (N, C, h, w) noisy latents.
        timestep: (N,) int64.
        guidance_scale: (N,) the scale at which each was being sampled.
        prompt: (N,) int64, index into the prompts.
        negative: (N,) int64, index of the null or negative prompt.
        any_scale: whether the target is known at every scale, or at its own alone.
    """

    any_scale: ClassVar[bool] = False

    latents: torch.Tensor
    timestep: torch.Tensor
    guidance_scale: torch.Tensor
    prompt: torch.Tensor
    negative: torch.Tensor

    def __len__(self) -> int:
        return len(self.timestep)

    def target(self, guidance_scale: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w), what the student must predict at these scales."""
        raise NotImplementedError

    @property
    def untrained(self) -> torch.Tensor:
        """(N, C, h, w), what it predicts before it has learnt anything."""
        raise NotImplementedError

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every field by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to(self, device: torch.device) -> Self:
        """The states on a device. Pools and rings lie on the CPU, whatever trains."""
        return type(self)(**{k: v.to(device) for k, v in self.tensors().items()})

    def joined(self, others: Sequence[Self]) -> Self:
        """These states, then those of ``others``."""
        if not others:
            return self
        parts = [part.tensors() for part in (self, *others)]
        return type(self)(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def pick(self, index: torch.Tensor) -> Self:
        """The states at ``index``."""
        return type(self)(**{k: v[index] for k, v in self.tensors().items()})


class Source(Protocol):
    """Where states come from. Its whole memory is in ``tensors``, so that it resumes exactly."""

    @property
    def kind(self) -> type[States]:
        """Of the states that it gives."""
        ...

    def draw(self, n: int, generator: torch.Generator) -> States:
        """The next ``n`` states."""
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What must be saved."""
        ...

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put it back."""
        ...


class Replay:
    """A ring of recent states, so that each pair of teacher passes serves many updates.

    Args:
        source: where new states come from.
        capacity: states kept.
        reuse: how many times a state is trained on, on average, while it is kept.
    """

    def __init__(self, source: Source, capacity: int, reuse: int) -> None:
        self.source, self.capacity, self.reuse = source, capacity, reuse
        self.states: States | None = None
        self.written = 0

    def draw(self, n: int, step: int, generator: torch.Generator) -> States:
        """``n`` states for training step ``step``; new ones are made every ``reuse`` steps.

        The ring is filled before the first step, so that trajectories have spread over
        all timesteps by then.
        """
        states = self.states = self._filled(n, generator)
        if step % self.reuse == 0:
            new = self._made(n, generator)
            where = (self.written + torch.arange(len(new))) % len(states)
            for name, value in new.tensors().items():
                getattr(states, name)[where] = value
            self.written += len(new)
        return states.pick(torch.randint(len(states), (n,), generator=generator))

    def _filled(self, n: int, generator: torch.Generator) -> States:
        """The ring with as many states as it can hold, in batches of ``n``."""
        parts = [] if self.states is None else [self.states]
        held = sum(map(len, parts))
        while not parts or held + n <= self.capacity:
            parts.append(self._made(n, generator))
            held += n
            self.written += n
        return parts[0].joined(parts[1:]) if len(parts) > 1 else parts[0]

    def _made(self, n: int, generator: torch.Generator) -> States:
        new = self.source.draw(n, generator)
        # one memory layout for all: a state read back from a checkpoint must meet the same
        # kernels, which round differently for other strides
        return type(new)(**{k: v.contiguous() for k, v in new.tensors().items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """Source and ring, for a checkpoint."""
        kept = {f"source.{k}": v for k, v in self.source.tensors().items()}
        if self.states is not None:
            kept |= {f"ring.{k}": v for k, v in self.states.tensors().items()}
        return kept | {"written": torch.tensor(self.written)}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put back what :meth:`tensors` gave.

        Raises:
            ValueError, KeyError, TypeError: it is of another kind of states, or not whole.
        """
        self.source.load({k[7:]: v for k, v in tensors.items() if k.startswith("source.")})
        ring = {k[5:]: v.clone() for k, v in tensors.items() if k.startswith("ring.")}
        for name, value in (ring | {"written": tensors["written"]}).items():
            if value.dtype != (torch.int64 if name in _WHOLE else torch.float32):
                raise ValueError(f"{name} of the ring is {value.dtype}")
        if len({len(v) for v in ring.values()}) > 1:
            raise ValueError("the ring has more of some tensors than of others")
        self.states = self.source.kind(**ring) if ring else None
        self.written = int(tensors["written"])
