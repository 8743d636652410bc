"""Ways in which a file comes to harm: each gives what is left of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save

KIB = 1024
DTYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool,
)  # fmt: skip


@dataclass(frozen=True)
class Damage:
    """One harm: to which file, what kind, and its bytes afterwards."""

    path: Path
    kind: str
    content: bytes


def truncated(path: Path, every: int = KIB) -> Iterator[Damage]:
    """Cut off at each multiple of ``every`` bytes, and just before the end."""
    whole = path.read_bytes()
    for end in (*range(0, len(whole), every), len(whole) - 1):
        yield Damage(path, "truncated", whole[:end])


def flipped(path: Path, number: int, seed: int) -> Iterator[Damage]:
    """One bit the other way, ``number`` times, half of them in the first KiB, where names and
    shapes are."""
    whole, draw = path.read_bytes(), random.Random(seed)
    for i in range(number):
        content = bytearray(whole)
        place = draw.randrange(min(KIB, len(whole)) if i % 2 else len(whole))
        content[place] ^= 1 << draw.randrange(8)
        yield Damage(path, "one bit flipped", bytes(content))


def altered(path: Path) -> Iterator[Damage]:
    """As another program might write a safetensors file, whole but wrong: each tensor in turn
    missing, of another shape, and of another type; one too many; none at all."""
    tensors = load(path.read_bytes())

    def written(kind: str, other: dict[str, torch.Tensor]) -> Damage:
        return Damage(path, kind, save(other, {"format": "pt"}))

    for i, (name, value) in enumerate(sorted(tensors.items())):
        rest = {k: v for k, v in tensors.items() if k != name}
        yield written("a tensor missing", rest)
        shapes = (value[None].clone(), value.flatten()[: value.numel() // 2].clone())
        yield written("a tensor of another shape", rest | {name: shapes[i % 2]})
        yield written("a tensor of another type", rest | {name: value.to(DTYPES[i % len(DTYPES)])})
    yield written("a tensor too many", tensors | {"stranger": torch.zeros(2)})
    yield written("no tensor", {})
