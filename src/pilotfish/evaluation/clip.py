"""The scorer: a CLIP that scores images against names. It takes no part in training a guide."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from pilotfish import bundled
from pilotfish.errors import in_brief

BATCH = 256


class Scorer:
    """Unit-norm features of images and texts, by any CLIP.

    Images are resized and normalised with tensor operations, as the processor's settings say,
    so that a thousand of them need not pass through PIL.

    Args:
        model: a CLIP with projections.
        processor: its processor: image size, mean and standard deviation, tokenizer.

    Raises:
        ValueError: the processor gives no image size.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = processor.tokenizer
        settings = processor.image_processor
        self.size, self.stretched = _size(settings)
        self.mean = torch.tensor(settings.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(settings.image_std).view(1, 3, 1, 1)

    @classmethod
    def bundled(cls) -> Self:
        """The scorer of the bundled models."""
        return cls(*bundled.load_scorer())

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """A CLIP in transformers' format, from a local folder; nothing is downloaded.

        Raises:
            ValueError: there is no such folder, or it holds no CLIP.
        """
        if not Path(folder).is_dir():
            raise ValueError(f"no CLIP in {folder}: there is no such folder")
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            return cls(model.float(), CLIPProcessor.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"no CLIP could be read from {folder}: {in_brief(error)}") from error

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, h, w), the input of the vision model.

        An image that is not square is cropped or stretched, as the processor would do it.
        """
        device = self.model.device
        images = images.to(device, torch.float32)
        height, width = self.size
        if self.stretched:
            target = (height, width)
        else:  # the short edge first, then the middle
            ratio = max(height / images.shape[2], width / images.shape[3])
            target = (round(images.shape[2] * ratio), round(images.shape[3] * ratio))
        if tuple(images.shape[2:]) != target:
            images = F.interpolate(images, target, mode="bicubic", antialias=True)
            images = images.clamp(-1, 1)
        top, left = (target[0] - height) // 2, (target[1] - width) // 2
        images = images[:, :, top : top + height, left : left + width]
        return ((images + 1) / 2 - self.mean.to(device)) / self.std.to(device)

    @torch.no_grad()
    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, D), the vision model's pooled output."""
        parts = [
            self.model.vision_model(self.prepare(part)).pooler_output
            for part in images.split(BATCH)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def images(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) images in [-1, 1] -> (N, d) features of length 1."""
        return F.normalize(self.model.visual_projection(self.pooled(images)), dim=1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """N texts -> (N, d) features of length 1. A text that is too long is truncated."""
        length = self.model.config.text_config.max_position_embeddings
        parts = []
        for i in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                texts[i : i + BATCH], padding="max_length", truncation=True,
                max_length=length, return_tensors="pt",
            )  # fmt: skip
            # The text model is causal and pools at the end token, before the padding: it needs
            # no mask.
            pooled = self.model.text_model(tokens.input_ids.to(self.model.device)).pooler_output
            parts.append(F.normalize(self.model.text_projection(pooled), dim=1))
        return torch.cat(parts)


class FrechetFeatures(nn.Module):
    """The features of the Fréchet distance: the scorer's pooled vision output, not normalised.

    The projection is trained to match the text: it maps two styles of one name to the same
    point, and the distance is to measure the style.

    Attributes:
        num_features: D, the width of the output.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer = (scorer,)  # in a tuple, so that its parameters are not the metric's
        self.num_features = int(scorer.model.config.vision_config.hidden_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, D) on the CPU, where the metric keeps its sums in
        float64."""
        return self._scorer[0].pooled(images).cpu()


def _size(settings: Any) -> tuple[tuple[int, int], bool]:
    """((height, width), whether images are stretched to it rather than cropped)."""
    size, crop = _fields(settings.size), _fields(getattr(settings, "crop_size", None))
    if "height" in size and "width" in size:
        stretched = (size["height"], size["width"])
        if not settings.do_center_crop or crop in ({}, size):
            return stretched, True
        raise ValueError("a scorer that crops after stretching is not supported")
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        if settings.do_center_crop and crop not in ({}, {"height": edge, "width": edge}):
            raise ValueError(
                f"a scorer that resizes to {edge} and crops to {crop} is not supported"
            )
        return (edge, edge), False
    raise ValueError("the scorer's processor gives no image size")


def _fields(size: Any) -> dict[str, int]:
    """The values of a processor's size that are set."""
    return {k: int(v) for k, v in dict(size or {}).items() if v is not None}
