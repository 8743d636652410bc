"""Teacher and student: the frozen base with its two passes, and the base with a guide."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pilotfish.backbones import GuidedPass, current_pass, install
from pilotfish.conditioning import Prompts
from pilotfish.guides import Guide
from pilotfish.interface import TextConditions


class Conditioned:
    """A denoiser that is called with encoded prompts, and told the size of the picture where it
    asks for it (SDXL). What it is given may lie on another device; the answer comes back there.

    Args:
        denoiser: the denoiser.
        time_ids: (1, 6), SDXL's sizes and crop.
    """

    def __init__(self, denoiser: nn.Module, time_ids: torch.Tensor | None = None) -> None:
        self.denoiser, self.time_ids = denoiser, time_ids

    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompts: TextConditions
    ) -> torch.Tensor:
        """The prediction, (N, C, h, w)."""
        place, more = prompts.device, {}
        if prompts.pooled is not None and self.time_ids is not None:
            sizes = self.time_ids.to(place, prompts.dtype).expand(len(latents), -1)
            more = {"added_cond_kwargs": {"text_embeds": prompts.pooled, "time_ids": sizes}}
        prediction: torch.Tensor = self.denoiser(
            latents.to(place, prompts.dtype), timestep.to(place), prompts.hidden_states,
            return_dict=False, **more,
        )[0]  # fmt: skip
        return prediction.to(latents.device)


class Teacher:
    """The base denoiser's two predictions, without gradient.

    Args:
        denoiser: the base; its parameters are frozen here.
        prompts: every prompt by its index.
        time_ids: see :class:`Conditioned`.
    """

    def __init__(
        self, denoiser: nn.Module, prompts: Prompts, time_ids: torch.Tensor | None = None
    ) -> None:
        self.base = Conditioned(denoiser.eval().requires_grad_(False), time_ids)
        self.prompts = prompts

    @torch.no_grad()
    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Predictions for (negative, prompt), each given by its index (N,), in one doubled call."""
        both = self.prompts(torch.cat([negative, prompt]))
        made = self.base(latents.repeat(2, 1, 1, 1), timestep.repeat(2), both)
        unconditional, conditional = made.float().chunk(2)
        return unconditional, conditional


class Student(nn.Module):
    """The base with a guide installed, one pass, at a scale for each sample.

    Only the guide is a submodule; the base is held outside the module tree, so that it
    is neither trained, nor averaged, nor wrapped.

    Args:
        guide: the guide.
        denoiser: the base.
        time_ids: see :class:`Conditioned`.
    """

    def __init__(
        self, guide: Guide, denoiser: nn.Module, time_ids: torch.Tensor | None = None
    ) -> None:
        super().__init__()
        self.guide = guide
        self._base = (Conditioned(denoiser, time_ids),)
        self.hooks = install(guide, denoiser)  # type: ignore[arg-type]

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        prompts: TextConditions,
        negative_prompts: TextConditions,
        guidance_scale: torch.Tensor,
    ) -> torch.Tensor:
        """The guided prediction, (N, C, h, w).

        Args:
            prompts: N, on the denoiser's device.
            negative_prompts: N, or one that serves all; there as well.
            guidance_scale: (N,).
        """
        (base,) = self._base
        guided = GuidedPass(
            self.guide, lambda: guidance_scale, lambda: negative_prompts, hooks=self.hooks
        )
        with guided.open():
            return base(latents, timestep, prompts)


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
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
