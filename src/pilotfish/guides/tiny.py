"""The tiny guide: most of its effect comes from the base's own weights.

CFG adds to the conditional prediction its difference to the unconditional one, ``w - 1`` times.
The guide adds in five places of the one pass:

- *Text.* The prompt is extrapolated away from the negative prompt before it enters the base:
  ``c + g (c - n)`` with a learned gain g. To first order in g the base then does what equation
  (1) does, with its own weights.
- *Attention.* The output of each layer that attends to the text is extrapolated away from what
  it would be with the negative prompt, ``a + g (a - a_n)``, for the price of a few more keys and
  values (NAG, arXiv 2505.21179, with learned gains).
- *Modulation.* Where pooled text enters the embedding of the timestep, what each layer takes
  from that embedding is extrapolated in the same way.
- *Layers.* A convolution of low rank, modulated by w, time and text, adds to the output of some
  of the decoder's layers.
- *Prediction.* A small head, linear in ``w - 1`` as CFG is, adds to the prediction. It reads the
  latents as well, and may be given a learned unconditional template of the negative prompt.

The first three act through the model's own weights, so they transfer to fine-tunes.

After a refresh, a step with both passes, the last difference between the two predictions and its
age are known, and after two of them by how much the difference changes with time. The head then
adds ``w - 1`` times that difference as well, channel by channel with learned gains around 1, and a
learned part of the change since, and reads both. All parts are turned down by learned shares
between 0 and 1. With the shares and the gains of the difference at 1 and the rest at 0 that is
plain reuse of the difference; with all shares, and the gains of what was found, at 0 and the head
blind to it, it is the guide without refresh.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple, Self

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from pilotfish.backbones import Backbone
from pilotfish.guidance import guidance_strength
from pilotfish.guides.base import Guide
from pilotfish.guides.layers import Condition, zero_module
from pilotfish.guides.tiny_layers import (
    Age,
    LowRank,
    Path,
    Templates,
    add_to_layer,
    add_to_prediction,
)
from pilotfish.interface import (
    GuideError,
    GuideInputs,
    GuideOutput,
    Refresh,
    ResidualFunction,
    TextConditions,
)

TURNED_DOWN = 3.0
"""Where the logits of the shares start: after a refresh a new guide is close to plain reuse."""
SEEN_AFTER_REFRESH = 6
"""Maps with the prediction's channels that the head reads then: prediction and latents; and the
difference, conditional prediction and latents of the refresh, and the change since."""
HEAD, WITHOUT_LAYERS = 3, 16
"""Channels of the head for each channel of an addition, where its width is not given; where there
are no additions, for so many."""


@dataclass(frozen=True)
class TinySettings:
    """What can be chosen of a tiny guide."""

    text: bool = True
    """Whether the embeddings of the text are extrapolated."""
    attention: bool = True
    """Whether the attention layers that read the text are extrapolated."""
    joint_attention: Literal["whole", "sampled"] = "whole"
    """Where text and image attend to each other in one layer: the answer to the negative prompt by
    a second attention among all tokens, or from the pass's own answer, in which the text is
    exchanged, with the image's share of the softmax from ``image_tokens`` of its tokens. The
    second is for Stable Diffusion 3 alone."""
    image_tokens: int = 256
    """Of ``sampled`` joint attention. The second attention is taken where an image has no more."""
    negative_stream: Literal["joint", "cached"] = "joint"
    """What the negative prompt's tokens attend to in such layers: also to the image's, as in the
    unconditional pass, or to each other alone. The second is computed once a call, for all images
    and steps."""
    modulation: bool = True
    """Whether the layers that read the pooled text, with the embedding of the timestep, are
    extrapolated."""
    condition_on_negative: bool = False
    """Whether the guide is conditioned on the negative prompt itself, and not only on its
    difference to the prompt. Worth its few parameters where ``--negative_prompt_prob`` is
    large."""
    share: float = 0.01
    """The guide's parameters as a share of the denoiser's: where ``rank`` is left out, it and
    ``head`` are chosen as large as that allows, but the rank is at least 1."""
    rank: int | None = None
    """Channels of the addition to a decoder layer, at most half of that layer's; 0 for none."""
    layers: int = 4
    """How many of the decoder's layers get such an addition: evenly spaced, the last among
    them."""
    head: int | None = None
    """Channels of the head at the prediction; 0 for none. Left out: three times the rank."""
    uncond_templates: int = 0
    """Learned unconditional templates that are mixed by the negative prompt; 0 for none. Needs
    ``condition_on_negative`` and a head."""
    condition_dim: int = 32
    """Width of the embedding of time, w and text."""
    normalize_text: bool = True
    """Whether what the guide reads of the text's embeddings is divided by their root mean square,
    which differs between text encoders."""
    refresh: bool = True
    """Whether the guide uses what a step with both passes found, in the steps after it."""


class TinyGuide(Guide, guide_type="tiny", settings=TinySettings):
    """See the module.

    Args:
        signature: of the denoiser (:meth:`pilotfish.backbones.Backbone.signature`).
        guidance_scale_range: the (low, high) of w in training.
        times: of a guide distilled to few steps, those that it was trained at.
        refresh_ratio: see :attr:`Guide.refresh_ratio`.
        trained_on: name and revision of the base, where they are known.
        teacher: see :class:`Guide`.

    The others are those of :class:`TinySettings`, whose ``share`` :meth:`for_denoiser` takes.
    Guides from before there was ``normalize_text`` are made without.

    Raises:
        GuideError: no part is left, or the templates lack what they need.
    """

    learning_rate = 1e-2

    @register_to_config
    def __init__(
        self,
        signature: dict[str, Any],
        text: bool = True,
        attention: bool = True,
        joint_attention: Literal["whole", "sampled"] = "whole",
        image_tokens: int = 256,
        negative_stream: Literal["joint", "cached"] = "joint",
        modulation: bool = True,
        condition_on_negative: bool = False,
        rank: int = 16,
        layers: int = 4,
        head: int = 48,
        uncond_templates: int = 0,
        condition_dim: int = 32,
        normalize_text: bool = False,
        refresh: bool = True,
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None,
        refresh_ratio: float = 0.0,
        trained_on: dict[str, str] | None = None,
        teacher: dict[str, Any] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:
        super().__init__()
        sites = dict(signature["attention"]) if attention else {}
        sites |= dict.fromkeys(signature["modulation"], 1) if modulation else {}
        if not (text or sites or rank or head):
            raise GuideError(
                "a tiny guide needs at least one of text, attention, modulation, rank and head "
                "(a denoiser without pooled text has no modulation)"
            )
        if uncond_templates and not (condition_on_negative and head):
            raise GuideError("uncond_templates needs condition_on_negative and a head")
        self.condition = Condition(
            signature["text_dim"], condition_dim, condition_on_negative, normalize_text
        )
        self.text_gain = zero_module(nn.Linear(condition_dim, 1)) if text else None
        self.sites = sites
        gains = sum(sites.values())
        self.gains = zero_module(nn.Linear(condition_dim, gains)) if gains else None
        added = dict(spread(signature["layers"], layers)) if rank else {}
        self.names = tuple(added)
        ranks = [min(rank, c // 2) for c in added.values()]
        self.additions = nn.ModuleList(map(LowRank, added.values(), added.values(), ranks))
        self.head_name, features, channels = (
            signature["head"][key] for key in ("module", "features", "channels")
        )
        seen = features + (SEEN_AFTER_REFRESH if refresh else 2) * channels
        self.prediction_head = LowRank(seen, channels, head) if head else None
        self.templates = (
            Templates(condition_dim, channels, uncond_templates) if uncond_templates else None
        )
        # gain and shift of every layer and of the head, then the head's scalings
        self.widths = [2 * r for r in (*ranks, head) if r]
        self.scalings = (SEEN_AFTER_REFRESH if refresh else 2) * channels if head else 0
        self.age = Age(condition_dim, self.scalings) if refresh else None
        # of the text, of each site, of each layer, of the head, of the templates
        parts = 1 + len(sites) + len(added) + 1 + 1
        self.turned_down = nn.Linear(condition_dim, parts) if refresh else None
        if self.turned_down is not None:
            nn.init.constant_(self.turned_down.bias, TURNED_DOWN)
        total = sum(self.widths) + self.scalings
        self.modulate = nn.Linear(condition_dim, total) if total else None
        if self.modulate is not None:
            self._reset(self.modulate)

    @classmethod
    def for_denoiser(
        cls, denoiser: Any, prediction_type: str, *, share: float = TinySettings.share,
        rank: int | None = None, head: int | None = None,
        normalize_text: bool = TinySettings.normalize_text, **config: Any,
    ) -> Self:  # fmt: skip
        """A fresh guide for a denoiser.

        Args:
            share: see :class:`TinySettings`, as for the others.

        Raises:
            GuideError: the denoiser belongs to no family that takes a guide.
        """
        signature = Backbone.of(denoiser).signature(prediction_type)

        def make(rank: int) -> Any:
            width = HEAD * (rank or WITHOUT_LAYERS) if head is None else head
            return cls(signature, rank=rank, head=width, normalize_text=normalize_text, **config)

        def size(rank: int) -> int:
            with torch.device("meta"):
                return sum(p.numel() for p in make(rank).parameters())

        if rank is None:
            allowed = share * sum(p.numel() for p in denoiser.parameters())
            most = max((c for _, c in signature["layers"]), default=2) // 2
            larger = size(1) <= allowed  # most small denoisers allow no more
            rank = bisect_right(range(1, most + 1), allowed, key=size) if larger else 1
        made: Self = make(rank)
        return made

    @property
    def corrects_refresh(self) -> bool:
        """With a head, where it was distilled to few steps."""
        refresh = self.age is not None and self.prediction_head is not None
        return refresh and self.times is not None

    @property
    def target_modules(self) -> tuple[str, ...]:
        """The decoder's layers and the last module, those that have a part."""
        return (*self.names, self.head_name) if self.prediction_head is not None else self.names

    @property
    def extrapolated(self) -> tuple[str, ...]:
        """Attention and modulation layers."""
        return tuple(self.sites)

    @property
    def joint_attention(self) -> str:
        """See :class:`TinySettings`."""
        return str(self.config.joint_attention)

    @property
    def image_tokens(self) -> int:
        """See :class:`TinySettings`."""
        return int(self.config.image_tokens)

    @property
    def negative_stream(self) -> str:
        """See :class:`TinySettings`."""
        return str(self.config.negative_stream)

    @torch.no_grad()
    def _reset(self, modulate: nn.Linear) -> None:
        """Gains start around 1, the head's scalings at 0."""
        start = 0
        for width in self.widths:
            modulate.bias[start : start + width // 2] += 1
            start += width
        modulate.weight[start:] = 0
        modulate.bias[start:] = 0

    def modulations(
        self, time: torch.Tensor, guidance_scale: torch.Tensor, text: TextConditions,
        negative: TextConditions, refresh: Refresh | None = None,
    ) -> Modulations:  # fmt: skip
        """What depends on time, scale, text and refresh alone; see :meth:`Guide.modulations`."""
        refresh = None if self.age is None else refresh
        age, of_age = None, None
        if self.age is not None and refresh is not None:
            age, of_age = self.age(time, guidance_scale, refresh)
        condition = self.condition(time, guidance_scale, text, negative, age)
        strength = guidance_strength(guidance_scale).to(condition.dtype)
        # inside the network the effect of a change saturates; at the prediction it is linear
        inside = torch.log1p(strength)[..., None]
        strength = strength[..., None]
        of_text, of_sites, of_templates = inside, inside, strength
        of_layers = [*[inside] * len(self.names), strength]
        if self.turned_down is not None and refresh is not None:
            known = refresh.known.to(condition.dtype)[:, None]
            kept = 1 - known * self.turned_down(condition).sigmoid()
            of_text, of_templates = inside * kept[..., :1], strength * kept[..., -1:]
            sites = [
                kept[..., 1 + i : 2 + i].expand(*kept.shape[:-1], heads)
                for i, heads in enumerate(self.sites.values())
            ]
            of_sites = inside * torch.cat(sites, -1) if sites else inside
            shares = kept[..., 1 + len(self.sites) : -1].split(1, -1)
            of_layers = [of * share for of, share in zip(of_layers, shares, strict=True)]
        text_gain, gains, paths, scalings, template = None, [], [], [], None
        if self.text_gain is not None:
            text_gain = (of_text * self.text_gain(condition))[..., None]
        if self.gains is not None:
            gains = (of_sites * self.gains(condition)).split([*self.sites.values()], -1)
        networks = self.networks()
        if self.modulate is not None:
            modulated = self.modulate(condition).split([*self.widths, self.scalings], -1)
            if self.prediction_head is None:
                of_layers = of_layers[:-1]
            for network, values, factor in zip(networks, modulated, of_layers, strict=False):
                gain, shift = values[..., None].chunk(2, -2)
                up = factor[..., None] * network.up
                paths.append(Path(gain * network.down, shift, up))
            if self.prediction_head is not None:
                scalings = self._scalings(strength, modulated[-1], of_age, refresh)
        if self.templates is not None:
            made = self.templates(self.condition.of_negative(negative), condition)
            template = of_templates[..., None, None] * made
        return Modulations(
            text_gain, tuple(gains), tuple(paths), tuple(scalings), template,
            tuple(network.kernel() for network in networks),
        )  # fmt: skip

    def _scalings(
        self, strength: torch.Tensor, made: torch.Tensor, of_age: torch.Tensor | None,
        refresh: Refresh | None,
    ) -> list[torch.Tensor]:  # fmt: skip
        """Those of prediction and latents and, after a refresh, of the four maps that it gives,
        (..., N, C, 1, 1) each."""
        if self.age is None:
            return [*(strength * made)[..., None, None].chunk(2, -3)]
        channels = made.shape[-1] // SEEN_AFTER_REFRESH
        if refresh is None or of_age is None:
            return [*(strength * made[..., : 2 * channels])[..., None, None].chunk(2, -3)]
        known = refresh.known.to(made.dtype)[:, None]
        of_age = of_age.to(made.dtype)
        plain, found = (made + of_age).split([2 * channels, 4 * channels], -1)
        found = torch.cat([1 + found[..., :channels], found[..., channels:]], -1)
        every = strength * torch.cat([plain, known * found], -1)
        return [*every[..., None, None].chunk(SEEN_AFTER_REFRESH, -3)]

    def networks(self) -> list[LowRank]:
        """Those of the layers, then the head's."""
        head = [] if self.prediction_head is None else [self.prediction_head]
        return [*self.additions, *head]

    def forward(self, inputs: GuideInputs, modulations: Modulations | None = None) -> GuideOutput:
        m = modulations or self.modulations(
            inputs.time, inputs.guidance_scale, inputs.text, inputs.negative, inputs.refresh
        )
        residuals: dict[str, ResidualFunction] = {
            name: partial(add_to_layer, path, kernel)
            for name, path, kernel in zip(self.names, m.paths, m.kernels, strict=False)
        }
        if self.prediction_head is not None:
            residuals[self.head_name] = partial(
                add_to_prediction, m.paths[-1], m.kernels[-1], m.scalings, m.template,
                inputs.latents, found_maps(inputs) if len(m.scalings) > 2 else (),
            )  # fmt: skip
        gains = dict(zip(self.sites, m.gains, strict=True)) if m.gains else {}
        return GuideOutput(text_gain=m.text_gain, gains=gains, residuals=residuals)


def found_maps(inputs: GuideInputs) -> tuple[torch.Tensor, ...]:
    """(N, C, h, w) what a refresh found: difference, conditional prediction, latents, and how far
    the difference has changed since."""
    refresh = inputs.refresh
    assert refresh is not None
    change = refresh.change(inputs.time)
    return refresh.difference, refresh.conditional, refresh.latents, change


def spread(layers: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the layers, or all where there are fewer: evenly spaced, the last among them."""
    n = len(layers)
    if count >= n:
        return list(layers)
    return [layers[round((i + 1) * n / count) - 1] for i in range(count)]


class Modulations(NamedTuple):
    """What a tiny guide makes of time, scale and text; leading dimensions (..., N). The kernels
    depend on none of them."""

    text_gain: torch.Tensor | None
    gains: tuple[torch.Tensor, ...]
    paths: tuple[Path, ...]
    scalings: tuple[torch.Tensor, ...]
    template: torch.Tensor | None
    kernels: tuple[torch.Tensor, ...]

    def unbind(self) -> list[Modulations]:
        """Those of each step of a schedule, which is the first dimension."""
        tensors = [self.text_gain, *self.gains, *(t for p in self.paths for t in p)]
        tensors += [*self.scalings, self.template]
        steps = max((len(t) for t in tensors if t is not None), default=0)
        # Products by 1, which are copies made by one operator: a compiled graph of views is made
        # for the number of steps, which differs from one refresh to the next.
        views = [at_step for t in tensors if t is not None for at_step in t]
        copies = iter(torch._foreach_mul(views, 1.0) if views else ())
        # what does not change along the schedule has one step there
        apart = [
            [None] * steps if t is None
            else steps * [next(copies)] if len(t) == 1
            else list(islice(copies, len(t)))
            for t in tensors
        ]  # fmt: skip
        n, k = 1 + len(self.gains), len(self.paths)
        return [
            Modulations(
                step[0], step[1:n], tuple(Path(*step[n + 3 * i : n + 3 * i + 3]) for i in range(k)),
                step[n + 3 * k : -1], step[-1], self.kernels,
            )
            for step in zip(*apart, strict=True)
        ]  # fmt: skip
