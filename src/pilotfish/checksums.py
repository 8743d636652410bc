"""Sealed files: safetensors with a SHA-256 of what they hold, and of the plain values beside it.

A truncated file refuses to load by itself; a flipped bit in a weight does not. With a seal it is
noticed. A file without one, of an older version or another library, is taken as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SEAL = "sha256"
"""The name of the seal in a file's metadata."""


class SealError(ValueError):
    """A file does not hold what was saved; the message names it."""


def save_sealed(tensors: Mapping[str, torch.Tensor], path: Path, beside: Any) -> None:
    """Write tensors and their seal.

    Args:
        beside: plain JSON that belongs to them, kept elsewhere.
    """
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(whole, str(path), metadata={"format": "pt", SEAL: _digest(whole, beside)})
    _order_metadata(path)


def seal(path: Path, beside: Any) -> None:
    """Seal a file that another library wrote."""
    aside = path.with_name(f".{path.name}.part")
    save_sealed(load_file(str(path)), aside, beside)
    aside.replace(path)  # not written over: its tensors lie in the file itself


def load_sealed(path: Path, beside: Any) -> dict[str, torch.Tensor]:
    """Read tensors.

    Raises:
        SealError: they, or what is ``beside`` them, are not those of the seal.
        OSError, SafetensorError: there is no such file, or it is truncated.
    """
    with safe_open(str(path), "pt") as file:
        seal = (file.metadata() or {}).get(SEAL)
    tensors: dict[str, torch.Tensor] = load_file(str(path))
    if seal is not None and seal != _digest(tensors, beside):
        raise SealError(f"{path}, or what lies beside it, is not what was saved: its seal differs")
    return tensors


def _order_metadata(path: Path) -> None:
    """Metadata are written in an order drawn at random; the same tensors must make the same
    file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(ordered.ljust(size))


def _digest(tensors: Mapping[str, torch.Tensor], beside: Any) -> str:
    digest = sha256(json.dumps(beside, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
