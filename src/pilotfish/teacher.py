"""Teacher and student: the frozen base with its two passes, and the base with a guide in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from pilotfish.backbones import Backbone, GuidedPass, current_pass, degraded
from pilotfish.conditioning import Prompts
from pilotfish.guidances import CFG, Guidance
from pilotfish.interface import GuideProtocol, Refresh, TextConditions

Sizes = torch.Tensor | Mapping[tuple[int, int], torch.Tensor | None] | None


class Denoiser:
    """A denoiser that is called with normalised times and encoded prompts. Its inputs may lie on
    another device; the prediction comes back there.

    Args:
        module: the denoiser.
        sizes: what :meth:`pilotfish.backbones.Backbone.sizes` gave, or that by the size (h, w) of
            the latents.
    """

    def __init__(self, module: nn.Module, sizes: Sizes = None) -> None:
        self.backbone, self.sizes = Backbone.of(module), sizes

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions
    ) -> torch.Tensor:
        """The prediction (N, C, h, w) at times (N,)."""
        place, sizes = text.device, self.sizes
        if isinstance(sizes, Mapping):
            sizes = sizes[(latents.shape[-2], latents.shape[-1])]
        made = self.backbone(latents.to(place, text.dtype), time.to(place), text, sizes)
        return made.to(latents.device)


class Teacher:
    """The two predictions of a guidance, without gradient.

    Args:
        denoiser: the base; its parameters are frozen here.
        prompts: every prompt by its index.
        sizes: see :class:`Denoiser`.
        guidance: how they are made and combined.
        weak: the denoiser of ``guidance.weak_model``.
    """

    def __init__(
        self, denoiser: nn.Module, prompts: Prompts, sizes: Sizes = None,
        guidance: Guidance = CFG, weak: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.base = Denoiser(denoiser.eval().requires_grad_(False), sizes)
        self.prompts, self.sizes, self.guidance = prompts, sizes, guidance
        self.weak = None if weak is None else weak.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Predictions for (negative, prompt), each given by its index (N,), in one doubled call.

        The first is what the guidance puts in its place (:meth:`Guidance.second`). A degraded
        denoiser runs in a call of its own, for the negative prompt or after the doubled call.
        """
        text, guidance = self.prompts(prompt), self.guidance
        if guidance.replaces_second:
            conditional = self.base(latents, time, text).float()
            if guidance.weak_prompt == "negative":
                text = self.prompts.negative(negative)
            return self._degraded(latents, time, text), conditional
        both = TextConditions.cat([self.prompts.negative(negative), text])
        made = self.base(torch.cat([latents, latents]), time.repeat(2), both)
        unconditional, conditional = made.float().chunk(2)
        worse = self._degraded(latents, time, text) if guidance.degrades else None
        return guidance.second(unconditional, conditional, worse), conditional

    def _degraded(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions
    ) -> torch.Tensor:
        with degraded(self.base.backbone.denoiser, self.guidance, self.weak) as denoiser:
            return Denoiser(denoiser, self.sizes)(latents, time, text).float()

    def guided(
        self, unconditional: torch.Tensor, conditional: torch.Tensor, w: torch.Tensor | float
    ) -> torch.Tensor:
        """What the guidance makes of the two predictions: for CFG the rule of the base's pipeline,
        which is equation (1) or its own."""
        rule = self.base.backbone.guidance_rule
        return self.guidance.combine(unconditional, conditional, w, rule)


class Student(nn.Module):
    """The base with a guide installed, one pass, at a scale for each sample.

    Only the guide is a submodule; the base is held outside the module tree, so that it is neither
    trained, nor averaged, nor wrapped.

    Args:
        guide: the guide.
        denoiser: the base.
        sizes: see :class:`Denoiser`.
    """

    def __init__(
        self, guide: GuideProtocol, denoiser: nn.Module, sizes: Sizes = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.guide: Any = guide
        self._base = (Denoiser(denoiser, sizes),)
        self.hooks = Backbone.of(denoiser).install(guide)

    def forward(
        self,
        latents: torch.Tensor,
        time: torch.Tensor,
        text: TextConditions,
        negative: TextConditions,
        guidance_scale: torch.Tensor,
        refresh: Refresh | None = None,
        due: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The guided prediction, (N, C, h, w).

        Args:
            time: (N,) normalised.
            text: N prompts, on the denoiser's device.
            negative: N negative prompts, or one that serves all; there as well.
            guidance_scale: (N,).
            refresh: what the last step with both passes found, in the shape of the latents.
            due: (N,) bool, the samples for which this step is one.
        """
        if due is None or not due.any():
            return self._pass(latents, time, text, negative, guidance_scale, refresh)
        # every process takes the pass with all parameters, whichever of its samples are due
        made = self._pass(latents, time, text, negative, guidance_scale, refresh)
        some = slice(None) if len(negative) == 1 else due
        both = self._pass(
            latents[due], time[due], text[due.to(text.device)], negative[some],
            guidance_scale[due], refresh and refresh[due], both_passes=True,
        )  # fmt: skip
        return made.index_put((due.nonzero()[:, 0],), both)

    def _pass(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions,
        negative: TextConditions, guidance_scale: torch.Tensor, refresh: Refresh | None,
        both_passes: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        (base,) = self._base
        guided = GuidedPass(
            self.guide, lambda: guidance_scale, lambda: negative, hooks=self.hooks,
            refresh_at=lambda steps: (0,) if both_passes else (),
        )  # fmt: skip
        if refresh is not None:
            guided.refresh = base.backbone.refresh_on_grid(refresh.to(text.device))
        with guided.open():
            return base(latents, time, text)


def checkpoint_in_pass(module: Callable[..., Any], *args: Any) -> Any:
    """Gradient checkpointing that runs the second time in the guided pass of the first, which is
    closed by then, and on a GPU in another thread."""
    guided = GuidedPass.current()

    def run(*given: Any) -> Any:
        with current_pass(guided):
            return module(*given)

    return checkpoint(run, *args, use_reentrant=False)


def checksum(module: nn.Module) -> str:
    """SHA-256 over every tensor of a module; training a guide must not change the base's."""
    digest = sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        for part in plain_tensors(value):
            digest.update(part.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def plain_tensors(value: torch.Tensor) -> list[torch.Tensor]:
    """What a quantised tensor consists of; any other alone."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in plain_tensors(getattr(value, name))]
