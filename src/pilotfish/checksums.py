"""Safetensors files with a SHA-256 checksum of their tensors and configuration.

safetensors detects a truncated file by itself, but not a flipped bit in a weight; the checksum
does. A file without a checksum, from another library, is loaded as it is.
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

METADATA_KEY = "sha256"
"""The key of the checksum in the metadata of a file."""


class ChecksumError(ValueError):
    """The content of a file differs from what was saved; the message names the file."""


def save_with_checksum(tensors: Mapping[str, torch.Tensor], path: Path, config: Any) -> None:
    """Write tensors and their checksum.

    Args:
        config: JSON values that the checksum covers too; they are stored in another file.
    """
    contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    digest = _digest(contiguous, config)
    save_file(contiguous, str(path), metadata={"format": "pt", METADATA_KEY: digest})
    _sort_metadata(path)


def add_checksum(path: Path, config: Any) -> None:
    """Add a checksum to a file that another library wrote."""
    temporary = path.with_name(f".{path.name}.part")
    # not in place: the tensors may be mapped from the file itself
    save_with_checksum(load_file(str(path)), temporary, config)
    temporary.replace(path)


def load_with_checksum(path: Path, config: Any) -> dict[str, torch.Tensor]:
    """Read tensors and compare their checksum.

    Raises:
        ChecksumError: the tensors or ``config`` differ from what was saved.
        OSError, SafetensorError: the file does not exist, or is truncated.
    """
    with safe_open(str(path), "pt") as file:
        saved = (file.metadata() or {}).get(METADATA_KEY)
    tensors: dict[str, torch.Tensor] = load_file(str(path))
    if saved is not None and saved != _digest(tensors, config):
        raise ChecksumError(
            f"checksum mismatch: {path}, or the configuration beside it, was changed after saving"
        )
    return tensors


def _sort_metadata(path: Path) -> None:
    """Sort the metadata: safetensors writes them in random order, and the same tensors must give
    the same file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(ordered.ljust(size))


def _digest(tensors: Mapping[str, torch.Tensor], config: Any) -> str:
    digest = sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
