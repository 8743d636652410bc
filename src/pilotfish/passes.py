"""Teacher and student: the frozen base with its two passes, and the base with a guide."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pilotfish.denoisers import GuidedPass, install
from pilotfish.guides import Guide

NULL = -1
"""The index of the null prompt among texts."""


class FrozenTeacher:
    """The base denoiser's two predictions, without gradient.

    What it is given may lie on another device than the denoiser; the answer comes back there.

    Args:
        denoiser: the base; its parameters are frozen here.
        texts: (P, L, D) encoder hidden states of every prompt, the null prompt last.
    """

    def __init__(self, denoiser: nn.Module, texts: torch.Tensor) -> None:
        self.denoiser = denoiser.eval().requires_grad_(False)
        self._texts, self.null = texts, texts[NULL:]

    @torch.no_grad()
    def __call__(
        self, latents: torch.Tensor, timestep: torch.Tensor, prompt: torch.Tensor,
        negative: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Predictions for (negative, prompt), each given by its index (N,), in one doubled call."""
        both, place = self.texts(torch.cat([negative, prompt])), self.null.device
        doubled = latents.repeat(2, 1, 1, 1).to(place, self.null.dtype)
        out = self.denoiser(doubled, timestep.repeat(2).to(place), both, return_dict=False)
        unconditional, conditional = out[0].to(latents.device, torch.float32).chunk(2)
        return unconditional, conditional

    def texts(self, index: torch.Tensor) -> torch.Tensor:
        """(N, L, D) encoder hidden states of texts (N,), on the denoiser's device."""
        return self._texts[index.to(self.null.device)]

    def negatives(self, index: torch.Tensor) -> torch.Tensor:
        """As :meth:`texts`, but (1, L, D) where all are the null prompt: a guide then has to look
        at it once."""
        return self.null if (index == NULL).all() else self.texts(index)


class GuidedStudent(nn.Module):
    """The base with a guide installed, one pass, at a scale for each sample.

    Only the guide is a submodule; the base is held outside the module tree, so that it
    is neither trained, nor averaged, nor wrapped. What it is given may lie on another device
    than the denoiser; the answer comes back there.
    """

    def __init__(self, guide: Guide, denoiser: nn.Module) -> None:
        super().__init__()
        self.guide = guide
        self._base = (denoiser,)
        self.hooks = install(guide, denoiser)  # type: ignore[arg-type]

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        states: torch.Tensor,
        negative_states: torch.Tensor,
        guidance_scale: torch.Tensor,
    ) -> torch.Tensor:
        """The guided prediction, (N, C, h, w).

        Args:
            states: (N, L, D) encoder hidden states, on the denoiser's device.
            negative_states: (1 or N, L, D) of the null or negative prompt, there as well.
            guidance_scale: (N,).
        """
        (denoiser,), place = self._base, states.device
        guided = GuidedPass(self.guide, lambda: guidance_scale, lambda: negative_states)
        with guided.open():
            prediction: torch.Tensor = denoiser(
                latents.to(place, states.dtype), timestep.to(place), states, return_dict=False
            )[0]
        return prediction.to(latents.device)


def checkpoint_in_context(module: Callable[..., Any], *args: Any) -> Any:
    """Gradient checkpointing that runs the second time in the context of the first, so that a
    guided pass, though closed by then, still finds its guide."""
    return checkpoint(partial(copy_context().run, module), *args, use_reentrant=False)


def guidance_error(guided: torch.Tensor, cfg: torch.Tensor, conditional: torch.Tensor) -> float:
    """``E||guided - cfg||^2 / E||cond - cfg||^2``: 0 is perfect, 1 is no guide."""
    return float((guided - cfg).pow(2).sum() / (conditional - cfg).pow(2).sum())


def checksum(module: nn.Module) -> str:
    """SHA-256 over every tensor of a module; training a guide must not change the base's."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def encode_prompts(pipe: Any, prompts: list[str], batch: int = 64) -> torch.Tensor:
    """(P, L, D) encoder hidden states, by the pipeline's own ``encode_prompt``."""
    device = pipe._execution_device
    parts = [
        pipe.encode_prompt(prompts[i : i + batch], device, 1, False)[0]
        for i in range(0, len(prompts), batch)
    ]
    return torch.cat(parts)
