"""What passes between a denoiser and a guide: the one contract that every guide keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class GuideError(ValueError):
    """A guide cannot be read, or does not fit; the message names both sides."""


@dataclass(frozen=True)
class TextConditions:
    """Encoded prompts, as a denoiser takes them.

    Attributes:
        hidden_states: (N, L, D), the encoder hidden states.
        pooled: (N, E), the pooled text where the denoiser takes it as well (SDXL).
    """

    hidden_states: torch.Tensor
    pooled: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.hidden_states)

    def __getitem__(self, index: slice | torch.Tensor) -> TextConditions:
        pooled = None if self.pooled is None else self.pooled[index]
        return TextConditions(self.hidden_states[index], pooled)

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.hidden_states.device

    @property
    def dtype(self) -> torch.dtype:
        """Their precision."""
        return self.hidden_states.dtype

    def shared(self) -> TextConditions:
        """One prompt that serves all, where all are the same; otherwise these."""
        for given in (self.hidden_states, self.pooled):
            if given is not None and not torch.equal(given, given[:1].expand_as(given)):
                return self
        return self[:1]

    @staticmethod
    def cat(parts: Sequence[TextConditions]) -> TextConditions:
        """Several one after another."""
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return TextConditions(
            torch.cat([part.hidden_states for part in parts]), torch.cat(pooled) if pooled else None
        )


@dataclass(frozen=True)
class GuideInputs:
    """What a guide may look at, all of one denoiser call of batch size N.

    Attributes:
        latents: (N, C, h, w) noisy latents, the denoiser's own input.
        timestep: (N,) in [0, 1000).
        guidance_scale: (N,) w, at least 1 (a value below counts as 1).
        encoder_hidden_states: (N, L, D) the prompt.
        negative_hidden_states: (N, L, D) the null or negative prompt.
        added_cond_kwargs: what else the denoiser was given (SDXL's pooled text and sizes).
    """

    latents: torch.Tensor
    timestep: torch.Tensor
    guidance_scale: torch.Tensor
    encoder_hidden_states: torch.Tensor
    negative_hidden_states: torch.Tensor
    added_cond_kwargs: Mapping[str, torch.Tensor]


# (skip features, each (N, c_i, h_i, w_i), in the order in which the encoder makes them; what
# the mid block made, (N, c, h', w')) -> what is added to each (None: nothing), in the same order
EncoderResidual = Callable[
    [tuple[torch.Tensor, ...], torch.Tensor],
    tuple[tuple[torch.Tensor | None, ...], torch.Tensor | None],
]
# (what entered a module, what it made), each (N, ...) -> what is added to the latter
Residual = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GuideOutput:
    """What a guide adds to a pass, and where; it is asked once, before the pass.

    What the denoiser is going to make is not known by then, so most additions are functions
    of it. None stands for nothing.

    Attributes:
        text: (N, L, D), added to the encoder hidden states.
        encoder: asked when the mid block is done; its answers are added to the mid block's
            output and to the skip features on their way into the decoder.
        pushes: by the name of a layer that takes in the text, how far its answer is pushed away
            from its answer to the negative prompt, ``a + g (a - a_n)``. For a cross-attention
            layer it is (N, heads); for a residual layer, whose answer is what it takes from
            the embedding of timestep and text, (N, 1). The names are among those that the
            guide ``pushes``.
        modules: by the name of a module of the denoiser, what is added to its output. The
            names are among those that the guide ``touches``.
    """

    text: torch.Tensor | None = None
    encoder: EncoderResidual | None = None
    pushes: Mapping[str, torch.Tensor] = field(default_factory=dict)
    modules: Mapping[str, Residual] = field(default_factory=dict)


class GuideLike(Protocol):
    """A guide as the rooms below it see it."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def guidance_scale_range(self) -> tuple[float, float]: ...

    @property
    def timesteps(self) -> tuple[int, ...] | None: ...

    @property
    def touches(self) -> tuple[str, ...]: ...

    @property
    def pushes(self) -> tuple[str, ...]: ...

    def __call__(self, inputs: GuideInputs) -> GuideOutput: ...

    def check(self, fingerprint: Mapping[str, Any], used_on: Any = None) -> None: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...

    def eval(self) -> Any: ...
