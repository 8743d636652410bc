"""What a training step takes of memory at full size, with random weights.

It is computed on any machine, from the step itself run on tensors that have shapes and no
contents; and measured, where there is room for the real thing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from benchmarks.live_bytes import LiveBytes, module_bytes
from benchmarks.shapes import GUIDES, Shape, Steps, peak_bytes
from pilotfish.evaluation.machine import machine, versions
from pilotfish.evaluation.result import TrainingMemory
from pilotfish.guidance import classifier_free_guidance
from pilotfish.teacher import Student, checkpoint_in_pass

_CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "projection_dim": 768,
}  # fmt: skip
_OPEN_CLIP_H: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23,
    "num_attention_heads": 16, "projection_dim": 1024,
}  # fmt: skip
_OPEN_CLIP_G: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 20, "projection_dim": 1280,
}  # fmt: skip
TEXT_ENCODERS: Mapping[str, tuple[tuple[type[Any], dict[str, Any]], ...]] = {
    "sd15": ((CLIPTextModel, _CLIP_L),),
    "sd21": ((CLIPTextModel, _OPEN_CLIP_H),),
    "sdxl": ((CLIPTextModel, _CLIP_L), (CLIPTextModelWithProjection, _OPEN_CLIP_G)),
}
"""Those of the published models, by the name of the shape."""
VAE: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
"""That of all three."""


class TrainingStep:
    """One training step of a guide on its frozen base: the teacher's two passes, the student's,
    the way back, and the update, as :mod:`pilotfish.training` takes it.

    Args:
        shape: of the denoiser.
        guide: tiny or full.
        dtype: in which the base is held; the guide is float32.
        batch: latents at once.
        checkpointing: whether the base's activations are made a second time rather than kept.
    """

    def __init__(
        self, shape: Shape, guide: str, device: torch.device, dtype: torch.dtype, batch: int,
        checkpointing: bool = True,
    ) -> None:  # fmt: skip
        self.steps = Steps(shape, device, dtype, {guide: GUIDES[guide]}, torch.float32)
        if checkpointing:
            self.steps.unet.enable_gradient_checkpointing(checkpoint_in_pass)
        self.guide = self.steps.guides[guide]
        self.guide.requires_grad_(True).train()
        self.batch, self.device = batch, device

    def gradients(self) -> None:
        """All of it but the update."""
        steps, n, device = self.steps, self.batch, self.device
        side, channels = steps.unet.config.sample_size, steps.unet.config.in_channels
        z, t = torch.randn(n, channels, side, side, device=device), torch.full((n,), 500)
        scale = torch.full((n,), 4.0, device=device)
        with torch.no_grad():
            both = steps.base(z.repeat(2, 1, 1, 1), t.repeat(2), steps.prompts(2 * n))
            unconditional, conditional = both.float().chunk(2)
            target = classifier_free_guidance(unconditional, conditional, scale)
        student = Student(self.guide, steps.unet, steps.sizes)
        try:
            guided = student(z, t, steps.prompts(n), steps.prompts(1), scale)
            (guided.float() - target).pow(2).mean().backward()
        finally:
            student.hooks.remove()

    def begin(self) -> None:
        """Make the optimiser, its moments and the average, as they are after a first step."""
        self.optimizer = torch.optim.AdamW(self.guide.parameters(), 1e-3, foreach=False)
        for parameter in self.guide.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average = EMAModel(self.guide.parameters(), foreach=False)

    def step(self) -> None:
        """The whole."""
        self.gradients()
        torch.nn.utils.clip_grad_norm_(self.guide.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.guide.parameters())


def computed_parts(
    shape: Shape, guide: str, dtype: torch.dtype, batch: int, checkpointing: bool = True
) -> dict[str, float]:
    """Bytes of a training step by what they are for, the most at once where they come and go; it
    takes neither memory nor arithmetic."""
    with FakeTensorMode():
        return counted_parts(shape, guide, dtype, batch, checkpointing)


def counted_parts(
    shape: Shape, guide: str, dtype: torch.dtype, batch: int, checkpointing: bool = True
) -> dict[str, float]:
    """The same of a step that is taken."""
    with LiveBytes() as live:
        step = TrainingStep(shape, guide, torch.device("cpu"), dtype, batch, checkpointing)
        base, mine = (module_bytes(m) for m in (step.steps.unet, step.guide))
        live.most = before = live.now
        step.gradients()
        passing = live.most - before - mine  # gradients are there to the end
    return {
        "denoiser": base, "guide": mine, "gradients": mine, "moments": 2 * mine, "average": mine,
        "activations": passing,
    }  # fmt: skip


def around_the_denoiser(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of what else lies on the device: text encoders at the base's precision, which encode
    each batch of prompts, and a float32 VAE, which draws for validation."""
    with torch.device("meta"):
        texts = [kind(CLIPTextConfig(**config)) for kind, config in TEXT_ENCODERS[name]]
        vae = AutoencoderKL(**VAE)
    numbers = sum(p.numel() for text in texts for p in text.parameters())
    return {"text encoders": float(numbers * dtype.itemsize), "vae": module_bytes(vae)}


def training_memory(
    name: str, shape: Shape, guide: str, *, command: str, dtype: torch.dtype = torch.bfloat16,
    batch: int = 1, measured: bool = False, device: str = "cpu",
) -> TrainingMemory:  # fmt: skip
    """Compute what a training step takes, with gradient checkpointing, and measure it if asked.

    Args:
        name: of the shape, which tells the text encoders.
        guide: tiny or full.
        command: what the result says of how to repeat it.
        dtype: in which the base is held.
        batch: latents at once.
        measured: whether to take a real step; it needs the memory that it measures.
        device: on which.

    Raises:
        ValueError: a guide that is neither.
    """
    if guide not in GUIDES:
        raise ValueError(f"the memory of training is known of {', '.join(GUIDES)}, not of {guide}")
    parts = computed_parts(shape, guide, dtype, batch) | around_the_denoiser(name, dtype)
    peak, seconds = float("nan"), float("nan")
    if measured:
        where = torch.device(device)
        step = TrainingStep(shape, guide, where, dtype, batch)
        step.begin()
        start = time.perf_counter()
        peak = peak_bytes(step.step, where)
        seconds = time.perf_counter() - start
    return TrainingMemory(
        parts, peak, seconds, batch, str(dtype).removeprefix("torch."), command, machine(),
        versions(),
    )  # fmt: skip
