"""The judge: a CLIP that looks at pictures and names, and has no part in training a guide."""

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


class Judge:
    """Unit-norm features of pictures and texts, by any CLIP.

    Pictures are resized and normalised with tensor operations, as the processor's settings
    say, so that a thousand of them need not pass through PIL.

    Args:
        model: a CLIP with projections.
        processor: its processor: picture size, mean and deviation, tokenizer.

    Raises:
        ValueError: the processor gives no picture size.
    """

    def __init__(self, model: CLIPModel, processor: CLIPProcessor) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = processor.tokenizer
        settings = processor.image_processor
        self.size, self.whole = _size(settings)
        self.mean = torch.tensor(settings.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(settings.image_std).view(1, 3, 1, 1)

    @classmethod
    def embedded(cls) -> Self:
        """The judge that comes with the embedded model."""
        return cls(*bundled.load_scorer())

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Any CLIP in transformers' format, from a local folder; nothing is downloaded.

        Raises:
            ValueError: there is no such folder, or it holds no CLIP.
        """
        if not Path(folder).is_dir():
            raise ValueError(f"no judge in {folder}: there is no such folder")
        try:
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            return cls(model.float(), CLIPProcessor.from_pretrained(folder, local_files_only=True))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"no judge could be read from {folder}: {in_brief(error)}") from error

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, 3, h, w) as the vision model wants it.

        A picture that is not square keeps its middle where the processor would crop it, and
        is stretched where the processor would stretch it.
        """
        device = self.model.device
        images = images.to(device, torch.float32)
        height, width = self.size
        if self.whole:
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
        return torch.cat(
            [
                self.model.vision_model(self.prepare(part)).pooler_output
                for part in images.split(BATCH)
            ]
        )

    @torch.no_grad()
    def images(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) pictures in [-1, 1] -> (N, d) features of length 1."""
        return F.normalize(self.model.visual_projection(self.pooled(images)), dim=1)

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        """N texts -> (N, d) features of length 1. A text that is too long is cut."""
        room = self.model.config.text_config.max_position_embeddings
        parts = []
        for i in range(0, len(texts), BATCH):
            tokens = self.tokenizer(
                texts[i : i + BATCH], padding="max_length", truncation=True,
                max_length=room, return_tensors="pt",
            )  # fmt: skip
            # The text model is causal and pools at the end token: padding behind it, which
            # a mask would hide, is never seen.
            pooled = self.model.text_model(tokens.input_ids.to(self.model.device)).pooler_output
            parts.append(F.normalize(self.model.text_projection(pooled), dim=1))
        return torch.cat(parts)


class FrechetFeatures(nn.Module):
    """What the Fréchet distance compares: the judge's pooled vision output, unnormalised.

    Not the projection, for that is trained to answer the *name* alone: two styles of one name
    are each other's positives, so it is blind to just the style and finish that the distance
    is to measure. And not unit length, for a Gaussian fits a cloud in space, not a sphere.

    Attributes:
        num_features: D, the width of the output.
    """

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self._judge = (judge,)  # in a tuple, so that the metric does not own its parameters
        self.num_features = int(judge.model.config.vision_config.hidden_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in [-1, 1] -> (N, D), where the pictures lie."""
        return self._judge[0].pooled(images).to(images.device)


def _size(settings: Any) -> tuple[tuple[int, int], bool]:
    """((height, width), whether the whole picture is resized to it rather than cropped)."""
    size, crop = _fields(settings.size), _fields(getattr(settings, "crop_size", None))
    if "height" in size and "width" in size:
        stretched = (size["height"], size["width"])
        if not settings.do_center_crop or crop in ({}, size):
            return stretched, True
        raise ValueError("a judge that crops after stretching is not supported")
    if "shortest_edge" in size:
        edge = size["shortest_edge"]
        if settings.do_center_crop and crop not in ({}, {"height": edge, "width": edge}):
            raise ValueError(f"a judge that resizes to {edge} and crops to {crop} is not supported")
        return (edge, edge), False
    raise ValueError("the judge's processor gives no picture size")


def _fields(size: Any) -> dict[str, int]:
    """The values that are set of a processor's size."""
    return {k: int(v) for k, v in dict(size or {}).items() if v is not None}
