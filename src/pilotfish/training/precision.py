"""In what precision a training computes, and whether the processor can."""

from __future__ import annotations

import torch

BASE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def imitates_half_precision() -> bool:
    """Whether this processor has no arithmetic for half precision and torch imitates it, many
    times slower than float32: x86 without AVX-512."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def slowed_by(precision: str, device: torch.device) -> str | None:
    """A line for a person whose training in ``no``, ``fp16`` or ``bf16`` would be slow here."""
    if precision == "no" or device.type != "cpu" or not imitates_half_precision():
        return None
    return (
        f"this processor only imitates {precision}, and is many times slower with it; "
        "--mixed_precision no is the fast one here"
    )
