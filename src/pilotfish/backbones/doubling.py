"""Arguments of one denoiser call that runs both passes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pilotfish.interface import GuideError, TextConditions

TWO_LENGTHS = (
    "prompt and negative prompt are of two lengths, which this denoiser cannot take in one batch: "
    "encode both to the same length, or use refresh=0"
)


def without_mask(text: TextConditions) -> torch.Tensor:
    """The embeddings of prompts for a denoiser that takes no mask.

    Raises:
        GuideError: they have a mask, which stands for prompts of several lengths.
    """
    if text.mask is not None:
        raise GuideError(TWO_LENGTHS)
    return text.embeds


def twice_arguments(given: Mapping[str, Any], n: int) -> dict[str, Any]:
    """The arguments of a call of n rows, every batch twice. What attention processors are given,
    such as masks of images, stays: pipelines give the same to one pass and to two."""
    return {k: v if k.endswith("attention_kwargs") else twice(v, n) for k, v in given.items()}


def twice(value: Any, n: int) -> Any:
    """Every tensor of n rows, here or in lists and mappings, repeated; all else as it is."""
    if isinstance(value, torch.Tensor):
        return torch.cat([value, value]) if value.ndim and len(value) == n else value
    if isinstance(value, list | tuple):
        return type(value)(twice(v, n) for v in value)
    if isinstance(value, Mapping):
        return {k: twice(v, n) for k, v in value.items()}
    return value
