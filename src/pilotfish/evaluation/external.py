"""Inception FID and CLIP score through torchmetrics, for whoever has their weights at hand.

Nothing is downloaded: both ask for a local path, and say so plainly where it is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.multimodal import CLIPScore
from transformers import CLIPModel, CLIPProcessor

from pilotfish.data.images import to_pixels


class InceptionFID:
    """The usual FID, on the 2048 pooled features of Inception v3.

    Args:
        weights: file of torch-fidelity's Inception weights.
        real: (M, 3, H, W) real pictures in [-1, 1].

    Raises:
        ValueError: the file is missing or holds something else than tensors, or
            torch-fidelity is not installed.
    """

    def __init__(self, weights: str | Path, real: torch.Tensor) -> None:
        weights = Path(weights)
        if not weights.is_file():
            raise ValueError(f"no Inception weights in {weights}: there is no such file")
        try:
            # torch-fidelity will read it again; first make sure that tensors are all it holds.
            torch.load(weights, map_location="meta", weights_only=True)
            self.distance = FrechetInceptionDistance(
                feature=2048, feature_extractor_weights_path=str(weights), sync_on_compute=False
            )
        except ModuleNotFoundError as error:
            raise ValueError(
                "Inception FID needs torch-fidelity: pip install 'pilotfish[inception]'"
            ) from error
        except Exception as error:  # a foreign file can fail to unpack in any way
            raise ValueError(f"{weights} holds no Inception weights") from error
        for part in real.split(32):
            self.distance.update(to_pixels(part), real=True)

    def update(self, images: torch.Tensor, prompts: list[str]) -> None:
        """Add made pictures, (N, 3, H, W) in [-1, 1]; the prompts are not looked at."""
        self.distance.update(to_pixels(images), real=False)

    def compute(self) -> float:
        """The distance."""
        return float(self.distance.compute())


class ClipScore:
    """100 times the cosine of picture and prompt, by a CLIP of one's own.

    Args:
        folder: a CLIP in transformers' format.

    Raises:
        ValueError: there is no such folder, or it holds no CLIP.
    """

    def __init__(self, folder: str | Path) -> None:
        if not Path(folder).is_dir():
            raise ValueError(f"no CLIP in {folder}: there is no such folder")

        try:
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
            processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"no CLIP could be read from {folder}") from error
        pair: Any = (_Features(model.float().eval()), processor)
        self.score = CLIPScore(lambda: pair, sync_on_compute=False)

    def update(self, images: torch.Tensor, prompts: list[str]) -> None:
        """Add pictures, (N, 3, H, W) in [-1, 1], and their N prompts."""
        self.score.update(to_pixels(images), prompts)

    def compute(self) -> float:
        """The mean score, in [0, 100]."""
        return float(self.score.compute())


class _Features(nn.Module):
    """A CLIP as torchmetrics expects it: features are tensors (transformers 5 wraps them)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model.visual_projection(
            self.model.vision_model(pixels).pooler_output
        )
        return features

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model.text_projection(
            self.model.text_model(ids, attention_mask=mask).pooler_output
        )
        return features
