"""What a guide receives and what it returns.

Everything between a denoiser family (:mod:`pilotfish.backbones`) and a guide
(:mod:`pilotfish.guides`) passes through these classes, so that neither knows the other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import torch

from pilotfish.guidances import Guidance


class GuideError(ValueError):
    """A guide cannot be read, or does not fit; the message names both sides."""


@dataclass(frozen=True)
class TextConditions:
    """Encoded prompts, as a denoiser takes them.

    Attributes:
        embeds: (N, L, D) the encoder hidden states.
        pooled: (N, E) the pooled text, where the denoiser takes it (SDXL, SD3).
        mask: (N, L) 1 for tokens that count, where the denoiser takes a mask (PixArt, Sana).
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.embeds)

    def __getitem__(self, index: slice | torch.Tensor) -> TextConditions:
        return self._each(lambda tensor: tensor[index])

    @property
    def device(self) -> torch.device:
        """Device of the embeddings."""
        return self.embeds.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the embeddings."""
        return self.embeds.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in (self.embeds, self.pooled, self.mask) if t is not None)

    def to(self, dtype: torch.dtype) -> TextConditions:
        """Embeddings in another precision; the mask stays as it is."""
        pooled = None if self.pooled is None else self.pooled.to(dtype)
        return TextConditions(self.embeds.to(dtype), pooled, self.mask)

    def clone(self) -> TextConditions:
        """A copy whose tensors nobody else changes."""
        return self._each(torch.Tensor.clone)

    def expand(self, n: int) -> TextConditions:
        """One prompt repeated ``n`` times without memory; ``n`` prompts as they are."""
        return self._each(lambda tensor: tensor.expand(n, *tensor.shape[1:]))

    def one_if_equal(self) -> TextConditions:
        """The first prompt alone where all are equal, otherwise all."""
        for tensor in (self.embeds, self.pooled, self.mask):
            if tensor is not None and not torch.equal(tensor, tensor[:1].expand_as(tensor)):
                return self
        return self[:1]

    def mean(self) -> torch.Tensor:
        """(N, D) the mean over the tokens that count. Tokens of zeros do not: they stand for a text
        encoder that was left out (Stable Diffusion 3's T5)."""
        if self.mask is None:
            counted = (self.embeds != 0).any(-1).sum(1, keepdim=True).clamp(min=1)
            return self.embeds.sum(1) / counted.to(self.dtype)
        weight = self.mask.to(self.dtype)[..., None]
        return (self.embeds * weight).sum(1) / weight.sum(1).clamp(min=1)

    def minus(self, other: TextConditions) -> torch.Tensor:
        """(N, L, D) the difference to ``other`` (N or 1).

        Token by token where both have one length and no mask. Otherwise tokens do not
        correspond, and the mean of ``other`` is subtracted from every token that counts.
        """
        if self.mask is None and self.embeds.shape[1] == other.embeds.shape[1]:
            return self.embeds - other.embeds
        difference = self.embeds - other.mean()[:, None]
        return difference if self.mask is None else difference * self.mask.to(self.dtype)[..., None]

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TextConditions:
        pooled = None if self.pooled is None else change(self.pooled)
        mask = None if self.mask is None else change(self.mask)
        return TextConditions(change(self.embeds), pooled, mask)

    @staticmethod
    def cat(parts: Sequence[TextConditions]) -> TextConditions:
        """Several batches as one. Where lengths differ, the shorter are padded and masked."""
        length = max(part.embeds.shape[1] for part in parts)
        alike = len({(part.embeds.shape[1], part.mask is None) for part in parts}) == 1
        if not alike:
            parts = [part._padded(length) for part in parts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        masks = [part.mask for part in parts if part.mask is not None]
        return TextConditions(
            torch.cat([part.embeds for part in parts]),
            torch.cat(pooled) if pooled else None,
            torch.cat(masks) if masks else None,
        )

    def _padded(self, length: int) -> TextConditions:
        missing = length - self.embeds.shape[1]
        mask = torch.ones_like(self.embeds[..., 0]) if self.mask is None else self.mask
        pad = torch.nn.functional.pad
        return TextConditions(
            pad(self.embeds, (0, 0, 0, missing)), self.pooled, pad(mask, (0, missing))
        )


@dataclass(frozen=True)
class Refresh:
    """What the last step with both passes found, for N samples.

    Attributes:
        time: (N,) normalised time of that step.
        difference: (N, C, h, w) its conditional prediction minus its unconditional one, on the grid
            of :class:`GuideInputs`.
        conditional: (N, C, h, w) its conditional prediction.
        latents: (N, C, h, w) its latents.
        slope: (N, C, h, w) by how much the difference changes per unit of time, from the last two
            such steps at different times (:func:`pilotfish.refresh.new_refresh`); 0 where there was
            a single one.
        gap: (N,) the time between those two, at least 0; 0 where there was a single one.
        known: (N,) 1 where there was such a step; 0 where there was none, and all else is 0.
    """

    time: torch.Tensor
    difference: torch.Tensor
    conditional: torch.Tensor
    latents: torch.Tensor
    slope: torch.Tensor
    gap: torch.Tensor
    known: torch.Tensor

    @staticmethod
    def unknown(latents: torch.Tensor, time: torch.Tensor) -> Refresh:
        """Where there was none: N latents now, at times (N,)."""
        # laid out like a known one, for which a compiled graph would be made anew otherwise
        maps = {name: latents.new_zeros(latents.shape) for name in _MAPS}
        numbers = {name: torch.zeros_like(time) for name in ("time", "gap", "known")}
        return Refresh(**maps, **numbers)

    def __getitem__(self, index: torch.Tensor) -> Refresh:
        return Refresh(*(getattr(self, f.name)[index] for f in fields(self)))

    def change(self, time: torch.Tensor) -> torch.Tensor:
        """(N, C, h, w) how far the difference has changed until times (N,), at that slope."""
        elapsed = (time - self.time).to(self.slope.dtype)
        return elapsed.reshape(-1, *[1] * (self.slope.ndim - 1)) * self.slope

    def to(self, device: torch.device) -> Refresh:
        """On a device."""
        return Refresh(*(getattr(self, f.name).to(device) for f in fields(self)))

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Refresh:
        """With the four maps changed."""
        return replace(self, **{name: change(getattr(self, name)) for name in _MAPS})


_MAPS = ("difference", "conditional", "latents", "slope")


@dataclass(frozen=True)
class GuideInputs:
    """The inputs of a guide: one denoiser call of batch size N.

    Attributes:
        latents: (N, C, h, w) the noisy latents on the denoiser's grid of tokens. For patches of
            p x p, the C channels are those of a patch, in the order of the prediction's.
        time: (N,) normalised time in [0, 1]; 1 is noise.
        guidance_scale: (N,) w, at least 1 (a value below counts as 1).
        text: N prompts.
        negative: N null or negative prompts, or one that serves all.
        added_cond_kwargs: further conditions of the denoiser (SDXL's pooled text and sizes).
        refresh: what the last step with both passes found; None where there was none.
    """

    latents: torch.Tensor
    time: torch.Tensor
    guidance_scale: torch.Tensor
    text: TextConditions
    negative: TextConditions
    added_cond_kwargs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    refresh: Refresh | None = None


ResidualFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input, output) of a module, each (N, channels, h, w) -> the output with the guide's residual
added."""


@dataclass(frozen=True)
class GuideOutput:
    """What a guide adds to a pass. The guide runs once, before the pass.

    Attributes:
        text: (N, L, D) added to the text's embeddings.
        text_gain: (N, 1, 1) gain g of the text: the denoiser takes ``c + g (c - n)``.
        gains: by the name of an attention or modulation layer, the gain g of its extrapolation
            ``a + g (a - a_n)`` away from its output for the negative prompt: (N, heads) for an
            attention layer, (N, 1) for a modulation layer. See ``Guide.extrapolated``.
        residuals: by the name of a module, the function that adds to its output. See
            ``Guide.target_modules``.
        encoder: UNets only: what is added to each skip feature, in the order in which the
            encoder makes them, and to the mid block's output.
    """

    text: torch.Tensor | None = None
    text_gain: torch.Tensor | None = None
    gains: Mapping[str, torch.Tensor] = field(default_factory=dict)
    residuals: Mapping[str, ResidualFunction] = field(default_factory=dict)
    encoder: tuple[tuple[torch.Tensor, ...], torch.Tensor] | None = None


class GuideProtocol(Protocol):
    """The part of a guide that backbones and pipelines use."""

    @property
    def config(self) -> Any: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def guidance_scale_range(self) -> tuple[float, float]: ...

    @property
    def times(self) -> tuple[float, ...] | None: ...

    @property
    def refresh_ratio(self) -> float: ...

    @property
    def corrects_refresh(self) -> bool: ...

    @property
    def guidance(self) -> Guidance: ...

    @property
    def weak_denoiser(self) -> Any: ...

    @property
    def target_modules(self) -> tuple[str, ...]: ...

    @property
    def extrapolated(self) -> tuple[str, ...]: ...

    @property
    def joint_attention(self) -> str: ...

    @property
    def image_tokens(self) -> int: ...

    @property
    def negative_stream(self) -> str: ...

    def modulations(
        self, time: torch.Tensor, guidance_scale: torch.Tensor, text: TextConditions,
        negative: TextConditions, refresh: Refresh | None = None,
    ) -> Any: ...  # fmt: skip

    def __call__(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput: ...

    def check(self, signature: Mapping[str, Any], used_on: Any = None) -> None: ...

    def parameters(self) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...

    def eval(self) -> Any: ...
