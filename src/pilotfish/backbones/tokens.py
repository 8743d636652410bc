"""Tokens of an image transformer as maps: what a guide adds to is (N, channels, h, w) anywhere."""

from __future__ import annotations

import torch


def patchify(latents: torch.Tensor, patch: int) -> torch.Tensor:
    """(N, C, h, w) -> (N, patch^2 C, h / patch, w / patch), channels in the order (row, column,
    channel) in which the transformers of diffusers predict a patch."""
    if patch == 1:
        return latents
    n, channels, height, width = latents.shape
    grid = latents.reshape(n, channels, height // patch, patch, width // patch, patch)
    return grid.permute(0, 3, 5, 1, 2, 4).reshape(n, -1, height // patch, width // patch)


def to_map(tokens: torch.Tensor, grid: torch.Size) -> torch.Tensor:
    """(N, h w, channels) -> (N, channels, h, w), without a copy."""
    return tokens.transpose(1, 2).unflatten(2, tuple(grid))


def to_tokens(image: torch.Tensor) -> torch.Tensor:
    """(N, channels, h, w) -> (N, h w, channels)."""
    return image.flatten(2).transpose(1, 2)
