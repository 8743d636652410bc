"""What each preset of a training needs: memory by purpose, counted on fake tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.integers import KnownIntegers
from benchmarks.memory import (
    TensorMemory,
    module_bytes,
    pipeline_parts,
    stored_bytes,
    training_parts,
)
from benchmarks.parts import VAES
from benchmarks.report import markdown_table
from benchmarks.shapes import SHAPES
from benchmarks.step import default_dtype
from pilotfish.evaluation.results import Saved, versions
from pilotfish.training import presets
from pilotfish.training.config import DistillConfig, sides
from pilotfish.training.context import BASE_DTYPES

SHAPE_OF = {"sd35": "sd35-medium"}
"""The shape of a preset's base, where it has another name."""
WEIGHTS_OF = {"no": "", "fp8": "fp8", "nf4": "nf4"}
"""Stored weights as :mod:`benchmarks.memory` names them."""


@dataclass(frozen=True)
class PresetMemory:
    """What a preset needs, in bytes.

    Attributes:
        parts: of a training step, by purpose; the peak where they come and go.
        preview: of an image of validation while the training waits.
        text_encoders: weights of the text encoders, which come before all else and are freed.
        settings: of the preset.
    """

    parts: dict[str, float]
    preview: float
    text_encoders: float
    settings: dict[str, Any]

    @property
    def training(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class PresetsResult(Saved):
    """What presets need, by their names."""

    presets: dict[str, PresetMemory]
    command: str
    versions: dict[str, str]


def count_presets(names: Sequence[str], command: str) -> PresetsResult:
    """Count what some presets need."""
    return PresetsResult({name: count_preset(name) for name in names}, command, versions())


def count_preset(name: str) -> PresetMemory:
    """Count what a preset needs at the largest of its sizes.

    Raises:
        ValueError: its weights are stored in a form that is not counted.
    """
    config = DistillConfig(**{"output": "", **presets.settings(name, DistillConfig)})
    base = name.rpartition("-")[0]
    key = SHAPE_OF.get(base, base)
    shape, dtype = SHAPES[key], BASE_DTYPES[config.base_dtype]
    if config.base_quantization not in WEIGHTS_OF:
        raise ValueError(f"the memory of {config.base_quantization} weights is not counted")
    width, height = max(map(sides, config.resolutions), key=lambda s: s[0] * s[1])
    settings = {"condition_on_negative": config.guide.condition_on_negative}
    parts = training_parts(
        shape, "tiny", dtype, config.train_batch_size, config.gradient_checkpointing,
        size=(height, width), settings=settings,
    )  # fmt: skip
    weights = WEIGHTS_OF[config.base_quantization]
    parts["denoiser"], converted = stored_bytes(shape, dtype, weights)
    if converted:
        parts["layer in use"] = converted
    if config.use_8bit_adam:
        parts["moments"] /= 4
    kept = parts["denoiser"] + 2 * parts["guide"] + parts["moments"] + parts["average"]
    encoders = pipeline_parts(key, dtype)["text encoders"]
    return PresetMemory(
        parts, kept + decoding_bytes(key, height, width), encoders, {
            "train_batch_size": config.train_batch_size,
            "gradient_accumulation_steps": config.gradient_accumulation_steps,
            "base_quantization": config.base_quantization,
            "offload_text_encoders": config.offload_text_encoders,
            "use_8bit_adam": config.use_8bit_adam,
            "largest": f"{width}x{height}",
        },
    )  # fmt: skip


def decoding_bytes(name: str, height: int, width: int) -> float:
    """Peak memory of a float32 VAE that decodes one image of so many pixels."""
    with FakeTensorMode(), KnownIntegers(), TensorMemory() as tensors, torch.no_grad():
        with default_dtype(torch.float32):
            vae: Any = VAES[name]().eval()
        weights = module_bytes(vae)
        config = vae.config
        channels = config.get("latent_channels") or config.z_dim
        factor = int(2 ** (len(config.get("block_out_channels") or config.dim_mult) - 1))
        grid = (height // factor, width // factor)
        shape = (1, channels, *([1] if "dim_mult" in config else []), *grid)
        latents = torch.zeros(shape)
        tensors.peak = before = tensors.current
        vae.decode(latents, return_dict=False)
        return weights + tensors.peak - before


def room(card: int) -> float:
    """The bytes of a card of so many GB that a training may take: 1 GiB and 5 % are left to the
    driver, to the workspaces of kernels and to fragmentation."""
    return (card * 0.95 - 1) * 2**30


def presets_markdown(found: PresetsResult) -> str:
    """A line for each preset, and the command that counted them."""
    head = (
        "preset", "largest size", "batch × accumulation", "base", "training step, GiB",
        "of that activations", "preview, GiB", "text encoders, GiB",
    )  # fmt: skip
    rows = []
    for name, one in found.presets.items():
        s, gib = one.settings, 2**30
        offloaded = " (layer by layer)" if s["offload_text_encoders"] else ""
        base = "bf16" if s["base_quantization"] == "no" else s["base_quantization"]
        rows.append((
            f"`{name}`", s["largest"].replace("x", " × "),
            f"{s['train_batch_size']} × {s['gradient_accumulation_steps']}",
            base + ", 8-bit Adam" * s["use_8bit_adam"], f"{one.training / gib:.1f}",
            f"{one.parts['activations'] / gib:.1f}", f"{one.preview / gib:.1f}",
            f"{one.text_encoders / gib:.1f}{offloaded}",
        ))  # fmt: skip
    return f"{markdown_table(head, rows)}\n\nCounted by `{found.command}`.\n"
