"""One sampling step of a denoiser at full size, by mode.

Parameters and operations are counted on the meta device, which needs no memory; only the wall
clock needs real tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.integers import KnownIntegers
from benchmarks.shapes import Shape
from pilotfish.backbones import Backbone, GuidedPass, watch_hooks
from pilotfish.evaluation.results import GuideSize
from pilotfish.evaluation.speed import denoiser_flops
from pilotfish.guides import FullGuide, Guide, TinyGuide
from pilotfish.interface import Refresh, TextConditions
from pilotfish.teacher import Denoiser

GUIDES: dict[str, Callable[..., Guide]] = {
    "tiny": TinyGuide.for_denoiser,
    "tiny-cached": partial(TinyGuide.for_denoiser, negative_stream="cached"),
    "tiny-sampled": partial(
        TinyGuide.for_denoiser, joint_attention="sampled", negative_stream="cached"
    ),
    "full": FullGuide.for_denoiser,
}
"""Makers of fresh guides. The second and third cache the negative prompt's stream of joint
attention, and the third samples the image's tokens."""
STEPS = 25
"""Steps of the call whose mean step is measured: a guide makes some things once a call."""
REFRESHED = ", refreshed"
"""After the name of a guide: its step after one with both passes, what that found being given."""


class SamplingStep:
    """One sampling step of a denoiser, by mode: ``none``, ``cfg``, and each guide by its name.

    Args:
        shape: of the denoiser.
        device: ``meta`` counts without computing.
        dtype: of weights and activations.
        guides: names of the guides' types; left out, all that fit.
        guide_dtype: of the guides' weights; ``dtype`` if left out.
        compiled: use ``torch.compile``; each mode is compiled at its first step.
        side: pixels of the images, each way; left out, the pipeline's default.
        size: (height, width) of the images, in place of a side.
        settings: of the guides, other than the defaults.
        known_schedule: whether the guide is given all times of the call at once, as in a pipeline.
            Not on fake tensors: a step is found by its place in memory.

    Raises:
        ValueError: a guide that does not fit, or a size of a video.
    """

    def __init__(
        self, shape: Shape, device: torch.device, dtype: torch.dtype,
        guides: Collection[str] | None = None, guide_dtype: torch.dtype | None = None,
        compiled: bool = False, side: int | None = None, size: tuple[int, int] | None = None,
        settings: Mapping[str, Any] | None = None, known_schedule: bool = True,
    ) -> None:  # fmt: skip
        torch.manual_seed(0)
        guides = shape.guides if guides is None else guides
        if unfit := [name for name in guides if name not in shape.guides]:
            raise ValueError(f"no {unfit[0]} guide fits {shape.denoiser.__name__}")
        self.shape, self.device, self.dtype = shape, device, dtype
        self.known_schedule = known_schedule
        with device, default_dtype(dtype):
            self.denoiser: Any = shape.denoiser(**shape.config)
        self.backbone = Backbone.of(self.denoiser)
        setattr(self, self.backbone.component, self.denoiser)  # where a pipeline has it
        with device, default_dtype(guide_dtype or dtype):
            self.guides = {
                name: GUIDES[name](self.denoiser, shape.prediction_type, **(settings or {}))
                for name in guides
            }
        self.denoiser.eval().requires_grad_(False)
        for guide in self.guides.values():
            guide.eval().requires_grad_(False)
        size = size or (None if side is None else (side, side))
        self.latents = self._latents(size)
        if compiled:
            watch_hooks()
            self.denoiser.compile()
        high, wide = size or (shape.side or 0, shape.side or 0)
        self.sizes = torch.tensor([[high, wide, 0, 0, high, wide]], device=device)
        self.base = Denoiser(self.denoiser, self.sizes)

    def _latents(self, size: tuple[int, int] | None) -> tuple[int, ...]:
        """(C, h, w) or (C, F, h, w) of the latents of one image."""
        *channels, height, width = self.backbone.latent_shape()
        if size is None:
            return *channels, height, width
        if self.shape.side is None:
            raise ValueError("another size is possible for images, not for videos")
        pixels = self.shape.side // height
        if any(side % (2 * pixels) for side in size):
            sides = " x ".join(map(str, dict.fromkeys(size)))
            raise ValueError(f"the side must be a multiple of {2 * pixels} pixels, not {sides}")
        return *channels, size[0] // pixels, size[1] // pixels

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
        """A function that runs one step of a call of ``batch`` images, and when it is called again
        the next one. Hooks and inputs are in place, as they are in a pipeline. CFG runs its two
        passes as one denoiser call."""
        rows = 2 * batch if mode == "cfg" else batch
        z = torch.zeros(rows, *self.latents, device=self.device, dtype=self.dtype)
        t, prompts = torch.full((rows,), 0.5, device=self.device), self.prompts(rows)
        name, refresh = mode.removesuffix(REFRESHED), None
        if name not in self.guides:
            yield partial(self.base, z, t, prompts)
            return
        if name != mode:
            refresh = Refresh(t, z, z, z, z, t, torch.ones(rows, device=self.device))
        guide, negative, place = self.guides[name], self.prompts(1), -1
        hooks = self.backbone.install(guide)
        schedule = torch.full((STEPS,), 0.5 * self.backbone.num_train_timesteps).to(self.device)
        guided = GuidedPass(
            guide, lambda: 4.0, lambda: negative, step=lambda: place, hooks=hooks,
            timesteps=lambda: schedule if self.known_schedule else None,
        )  # fmt: skip

        def next_step() -> None:
            nonlocal place
            place += 1
            self.base(z, t, prompts)

        try:
            with guided.open():
                if refresh is not None:
                    guided.refresh = self.backbone.refresh_on_grid(refresh)
                yield next_step
        finally:
            hooks.remove()

    @torch.no_grad()
    def run(self, mode: str, batch: int, steps: int = 1) -> None:
        """Run the first steps of a call of ``batch`` images."""
        with KnownIntegers(), self.prepared(mode, batch) as step:
            for _ in range(steps):
                step()

    def prompts(self, rows: int) -> TextConditions:
        """Text conditions of zeros."""
        shape, zeros = self.shape, partial(torch.zeros, device=self.device, dtype=self.dtype)
        pooled = None if shape.pooled is None else zeros(rows, shape.pooled)
        mask = None
        if shape.masked:
            mask = torch.ones(rows, shape.tokens, device=self.device, dtype=torch.long)
        width = self.backbone.sites()["text_dim"]
        return TextConditions(zeros(rows, shape.tokens, width), pooled, mask)

    def flops(self, mode: str) -> int:
        """FLOPs of one image in the mean step of a call."""
        first, two = (denoiser_flops(self, partial(self.run, mode, 1, n)) for n in (1, 2))
        return int(mean_step(first, two - first))

    def seconds(self, mode: str, batch: int) -> float:
        """Wall clock of the mean step of a call."""
        with torch.no_grad(), self.prepared(mode, batch) as step:
            first = self._timed(step)
            return mean_step(first, first if mode in ("none", "cfg") else self._timed(step))

    def _timed(self, step: Callable[[], object]) -> float:
        self._synchronize()
        start = time.perf_counter()
        step()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def mean_step(first: float, later: float) -> float:
    """What a step costs in the mean of a call, from what its first and each later one does."""
    return (first + (STEPS - 1) * later) / STEPS


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The default dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
