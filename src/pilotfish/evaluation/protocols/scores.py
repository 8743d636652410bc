"""Scores of images on disk: CLIP score, PickScore, FID."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from pilotfish.data.images import from_pixels
from pilotfish.errors import in_brief
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.images import Progress
from pilotfish.evaluation.metrics import InceptionFID
from pilotfish.evaluation.processes import on_main
from pilotfish.evaluation.protocols.folders import ImageFolder
from pilotfish.evaluation.results import PartialResults
from pilotfish.teacher import checksum

BATCH = 32
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class PerImage:
    """A score of each image."""

    values: list[float]


@dataclass(frozen=True)
class Distance:
    """A score of all images together."""

    value: float


class Cosines:
    """The cosine of image and text by a CLIP, times a factor.

    Args:
        scorer: the CLIP.
        factor: 100 for the CLIP score; that of :func:`pickscore_factor` for PickScore.
        device: where it computes. It is moved there when it is first used.
    """

    def __init__(self, scorer: Scorer, factor: float, device: torch.device | str = "cpu") -> None:
        self.scorer, self.factor, self.device = scorer, factor, device
        self.checksum = checksum(scorer.model)

    def measure(self, files: Sequence[Path], texts: Sequence[str], progress: Progress) -> PerImage:
        """The score of each image with its text."""
        self.scorer.model.to(self.device)
        found: list[torch.Tensor] = []
        for i in range(0, len(files), BATCH):
            images = self.scorer.images(read_images(files[i : i + BATCH]))
            found.append((images * self.scorer.texts(list(texts[i : i + BATCH]))).sum(1).cpu())
            progress("scores", min(i + BATCH, len(files)), len(files))
        return PerImage((self.factor * torch.cat(found).double()).tolist())


def pickscore_factor(scorer: Scorer) -> float:
    """What PickScore multiplies the cosine with: the temperature that it was trained with."""
    return float(scorer.model.logit_scale.detach().exp())


class ReferenceFID:
    """FID to a folder of real images, which are read when they are first needed.

    A real image is cropped to its middle square and resized to the size of the generated ones.

    Args:
        weights: file of torch-fidelity's Inception weights.
        folder: of the real images.
        device: where the features are computed.

    Raises:
        ValueError: fewer than two images in the folder; as :class:`InceptionFID`.
    """

    def __init__(
        self, weights: str | Path, folder: str | Path, device: torch.device | str = "cpu"
    ) -> None:
        self.files = sorted(f for f in Path(folder).iterdir() if f.suffix.lower() in SUFFIXES)
        if len(self.files) < 2:
            raise ValueError(f"{folder} holds fewer than two images ({', '.join(SUFFIXES)})")
        self.meter = InceptionFID(weights, None, device)
        listed = repr([(file.name, file.stat().st_size) for file in self.files])
        self.facts = {
            "reference_images": sha256(listed.encode()).hexdigest(),
            "inception_weights": sha256(Path(weights).read_bytes()).hexdigest(),
        }
        self.size: tuple[int, int] | None = None

    def measure(self, files: Sequence[Path], progress: Progress) -> Distance:
        """The distance of generated images.

        Raises:
            ValueError: they are not as large as those before them.
        """
        with Image.open(files[0]) as first:
            size = first.size
        if self.size is None:
            self.meter.add_reference(self._reference(size, progress))
            self.size = size
        if size != self.size:
            raise ValueError(
                f"images of {size[0]}x{size[1]} pixels cannot be compared with those of "
                f"{self.size[0]}x{self.size[1]}; measure these models in a run of their own"
            )
        self.meter.reset()
        for i in range(0, len(files), BATCH):
            self.meter.update(read_images(files[i : i + BATCH]))
            progress("FID", min(i + BATCH, len(files)), len(files))
        return Distance(max(0.0, self.meter.compute()))

    def _reference(self, size: tuple[int, int], progress: Progress) -> Iterator[torch.Tensor]:
        for i in range(0, len(self.files), BATCH):
            yield read_images(self.files[i : i + BATCH], size)
            progress("reference images", min(i + BATCH, len(self.files)), len(self.files))


def read_images(files: Sequence[Path], size: tuple[int, int] | None = None) -> torch.Tensor:
    """(N, 3, H, W) images in [-1, 1].

    Args:
        size: width and height; the largest part of these proportions in the middle of each image is
            resized to it. None: the images are as they are.

    Raises:
        ValueError: a file is no image, or they differ in size.
    """
    arrays = []
    for file in files:
        try:
            with Image.open(file) as image:
                rgb = image.convert("RGB")
        except (OSError, ValueError) as error:
            raise ValueError(f"{file}: {in_brief(error)}") from error
        if size is not None:
            width, height = size
            scale = min(rgb.width / width, rgb.height / height)
            left, top = (rgb.width - scale * width) / 2, (rgb.height - scale * height) / 2
            box = (left, top, left + scale * width, top + scale * height)
            rgb = rgb.resize(size, Image.Resampling.BICUBIC, box=box)
        arrays.append(np.asarray(rgb))
    if len({array.shape for array in arrays}) > 1:
        raise ValueError(f"the images of {files[0].parent} differ in size")
    return from_pixels(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2))


@dataclass(frozen=True)
class Scorers:
    """The models that score, as far as they are wanted.

    Attributes:
        clip_score: also of the similarity to negative prompts.
        pickscore: of PickScore.
        fid: of FID.
    """

    clip_score: Cosines | None = None
    pickscore: Cosines | None = None
    fid: ReferenceFID | None = None

    def cosines(
        self, metric: Literal["clip_score", "pickscore"], images: ImageFolder,
        texts: Sequence[str], parts: PartialResults, progress: Progress,
    ) -> torch.Tensor:  # fmt: skip
        """(N,) the score of each image with a text; measured once.

        Raises:
            ValueError: it is not wanted.
        """
        scorer = self.clip_score if metric == "clip_score" else self.pickscore
        if scorer is None:
            raise ValueError(f"this needs the metric {metric}")
        found = _once(
            parts, PerImage, images,
            {"scorer": scorer.checksum, "factor": scorer.factor, "texts": list(texts)},
            lambda: scorer.measure(images.files, texts, progress),
        )  # fmt: skip
        return torch.tensor(found.values, dtype=torch.float64)

    def distance(self, images: ImageFolder, parts: PartialResults, progress: Progress) -> float:
        """FID; measured once. Not a number where it is not wanted."""
        fid = self.fid
        if fid is None:
            return math.nan
        return _once(
            parts, Distance, images, fid.facts, lambda: fid.measure(images.files, progress)
        ).value


def _once(
    parts: PartialResults, kind: type[Any], images: ImageFolder, facts: Mapping[str, Any],
    measure: Callable[[], Any],
) -> Any:  # fmt: skip
    """A score from the file, or measured by the first process and saved."""
    return parts.get(kind, {"images": images.facts, **facts}, lambda: on_main(measure))
