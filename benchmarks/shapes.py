"""Denoisers at full size with random weights, and one sampling step of each.

The cost of a pass does not depend on the weights. The shapes are those of the published models'
configurations. Parameters and operations are counted on the meta device, which needs no memory;
only the wall clock needs real tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from pilotfish.backbones import watch_hooks
from pilotfish.evaluation.results import GuideSize
from pilotfish.evaluation.speed import denoiser_flops
from pilotfish.guides import FullGuide, Guide, TinyGuide
from pilotfish.interface import Refresh, TextConditions
from pilotfish.teacher import Denoiser, Student

GUIDES: dict[str, type[Guide]] = {"tiny": TinyGuide, "full": FullGuide}
REFRESHED = ", refreshed"
"""After the name of a guide: its step after one with both passes, what that found being given."""
TOKENS = 77
POOLED = 1280


@dataclass(frozen=True)
class Shape:
    """A published denoiser: its configuration and its prediction type."""

    config: Mapping[str, Any]
    prediction_type: str = "epsilon"


_SD: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
}  # fmt: skip
SHAPES = {
    "sd15": Shape(_SD | {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}),
    "sd21": Shape(
        _SD | {
            "sample_size": 96, "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
        },
        "v_prediction",
    ),
    "sdxl": Shape({
        "sample_size": 128, "in_channels": 4, "out_channels": 4,
        "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + POOLED,
    }),
}  # fmt: skip
"""Stable Diffusion 1.5, 2.1 at 768 pixels and XL."""


class SamplingStep:
    """One sampling step of a denoiser, by mode: ``none``, ``cfg``, and each guide by its name.

    Args:
        shape: of the denoiser.
        device: ``meta`` counts without computing.
        dtype: of weights and activations.
        guides: guide types by name.
        guide_dtype: of the guides' weights; ``dtype`` if left out.
        compiled: use ``torch.compile``; each mode is compiled at its first step.
    """

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype,
        guides: Mapping[str, type[Guide]] = GUIDES, guide_dtype: torch.dtype | None = None,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        self.device, self.dtype = device, dtype
        with device, default_dtype(dtype):
            self.unet = UNet2DConditionModel(**shape.config)
        with device, default_dtype(guide_dtype or dtype):
            self.guides = {
                name: guide_type.for_denoiser(self.unet, shape.prediction_type)
                for name, guide_type in guides.items()
            }
        for module in (self.unet, *self.guides.values()):
            module.eval().requires_grad_(False)
        pixels = 8 * self.unet.config.sample_size
        if compiled:
            watch_hooks()
            self.unet.compile()
        self.sizes = torch.tensor([[pixels, pixels, 0, 0, pixels, pixels]], device=device)
        self.base = Denoiser(self.unet, self.sizes)

    @property
    def modes(self) -> tuple[str, ...]:
        """No guidance, CFG, and each guide."""
        return "none", "cfg", *self.guides

    @property
    def refreshed(self) -> tuple[str, ...]:
        """The modes of guides that take in what a step with both passes found."""
        return tuple(
            f"{name}{REFRESHED}" for name, g in self.guides.items() if g.config.get("refresh")
        )

    def guide_sizes(self) -> dict[str, GuideSize]:
        """Parameters of each guide, and their share of the denoiser's."""
        return {name: GuideSize.of(guide, self, name) for name, guide in self.guides.items()}

    @contextmanager
    def prepared(self, mode: str, batch: int) -> Iterator[Callable[[], object]]:
        """A function that runs one step of ``batch`` images. Hooks and inputs are in place, as
        they are in a pipeline before its first step. CFG runs its two passes as one call."""
        rows = 2 * batch if mode == "cfg" else batch
        side, channels = self.unet.config.sample_size, self.unet.config.in_channels
        z = torch.zeros(rows, channels, side, side, device=self.device, dtype=self.dtype)
        t, prompts = torch.full((rows,), 0.5, device=self.device), self.prompts(rows)
        name, refresh = mode.removesuffix(REFRESHED), None
        if name not in self.guides:
            yield partial(self.base, z, t, prompts)
            return
        if name != mode:
            refresh = Refresh(t, z, z, z, z, t, torch.ones(rows, device=self.device))
        student = Student(self.guides[name], self.unet, self.sizes)
        scale = torch.full((rows,), 4.0, device=self.device)
        try:
            yield partial(student, z, t, prompts, self.prompts(1), scale, refresh)
        finally:
            student.hooks.remove()

    @torch.no_grad()
    def run(self, mode: str, batch: int) -> None:
        """Run one step of ``batch`` images."""
        with self.prepared(mode, batch) as step:
            step()

    def prompts(self, rows: int) -> TextConditions:
        """Text conditions of zeros."""
        pooled, width = None, self.unet.config.cross_attention_dim
        if self.unet.config.addition_embed_type is not None:
            pooled = torch.zeros(rows, POOLED, device=self.device, dtype=self.dtype)
        embeds = torch.zeros(rows, TOKENS, width, device=self.device, dtype=self.dtype)
        return TextConditions(embeds, pooled)

    def flops(self, mode: str) -> int:
        """FLOPs of one step of one image."""
        return denoiser_flops(self, partial(self.run, mode, 1))

    def seconds(self, mode: str, batch: int) -> float:
        """Wall clock of one step."""
        with torch.no_grad(), self.prepared(mode, batch) as step:
            self._synchronize()
            start = time.perf_counter()
            step()
            self._synchronize()
            return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
