"""The figures: prompt score, Fréchet distances, agreement with the teacher's pictures.

Each meter is fed batch by batch and holds sums, never pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from pilotfish.evaluation.features import FrechetFeatures, Judge
from pilotfish.evaluation.result import Agreement

SAME_PICTURE = 100.0  # dB; stands for the infinite PSNR of a picture with itself


@dataclass
class PromptMeter:
    """Is the right name found among all names, from the picture alone?

    Args:
        names: (K, d) unit-norm features of every name.
    """

    names: torch.Tensor
    ranks: list[torch.Tensor] = field(default_factory=list, init=False)
    cosine_sum: float = field(default=0.0, init=False)

    def update(self, pictures: torch.Tensor, right: torch.Tensor) -> None:
        """Add pictures.

        Args:
            pictures: (N, d) unit-norm features.
            right: (N,) the index of each picture's own name.
        """
        similarity = pictures @ self.names.T
        own = similarity.gather(1, right[:, None])
        # A tie counts as a miss: a judge that finds all names alike knows nothing.
        self.ranks.append((similarity >= own).sum(1).cpu())
        self.cosine_sum += float(own.sum())

    def found(self, among: int = 1) -> torch.Tensor:
        """(N,) 1 for every picture whose own name is among the first, else 0."""
        ranks = torch.cat(self.ranks) if self.ranks else torch.zeros(0)
        return (ranks <= among).float()

    def compute(self) -> tuple[float, float, float]:
        """(prompt score, top-5, mean cosine); the first two in [0, 1]."""
        first, five = self.found(), self.found(5)
        mean = self.cosine_sum / (len(first) or math.nan)
        return float(first.mean()), float(five.mean()), mean


class FrechetMeter:
    """Fréchet distance of made pictures to real ones, in the judge's features.

    Args:
        judge: the judge.
        real: (M, 3, H, W) real pictures in [-1, 1]; None: there are none, and the distance
            is not a number.
    """

    def __init__(self, judge: Judge, real: torch.Tensor | None) -> None:
        self.known = real is not None
        self.distance = FrechetInceptionDistance(
            feature=FrechetFeatures(judge), sync_on_compute=False
        )
        for part in real.split(64) if real is not None else ():
            self.distance.update(part, real=True)

    def update(self, images: torch.Tensor) -> None:
        """Add made pictures, (N, 3, H, W) in [-1, 1]."""
        if self.known:
            self.distance.update(images, real=False)

    def compute(self) -> float:
        """The distance, at least 0.

        Raises:
            ValueError: fewer than two pictures on a side.
        """
        if not self.known:
            return math.nan
        counts = (self.distance.real_features_num_samples, self.distance.fake_features_num_samples)
        if min(int(n) for n in counts) < 2:
            raise ValueError("a Fréchet distance needs at least two real and two made pictures")
        # Roundoff can carry the distance of equal sets a little below 0.
        return max(0.0, float(self.distance.compute()))


@dataclass
class AgreementMeter:
    """How near a picture comes to the teacher's CFG picture of the same seed."""

    psnr: float = field(default=0.0, init=False)
    ssim: float = field(default=0.0, init=False)
    cosine: float = field(default=0.0, init=False)
    count: int = field(default=0, init=False)

    def update(
        self,
        images: torch.Tensor, cfg: torch.Tensor,
        features: torch.Tensor, cfg_features: torch.Tensor,
    ) -> None:  # fmt: skip
        """Add pictures (N, 3, H, W) in [-1, 1] and their unit-norm features (N, d)."""
        psnr = peak_signal_noise_ratio(images, cfg, data_range=2.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(images, cfg, data_range=2.0, reduction="none")
        assert isinstance(ssim, torch.Tensor)
        self.psnr += float(psnr.clamp(max=SAME_PICTURE).sum())
        self.ssim += float(ssim.sum())
        self.cosine += float((features * cfg_features).sum())
        self.count += len(images)

    def compute(self) -> Agreement:
        """Means over all pictures."""
        n = self.count or math.nan
        return Agreement(self.psnr / n, self.ssim / n, self.cosine / n)


@dataclass
class LatentMeter:
    """MSE(guided, cfg) / MSE(unguided, cfg) of final latents: 0 is the teacher, 1 is no guide."""

    guided: float = field(default=0.0, init=False)
    unguided: float = field(default=0.0, init=False)

    def update(self, guided: torch.Tensor, unguided: torch.Tensor, cfg: torch.Tensor) -> None:
        """Add final latents of the same seeds, (N, C, h, w) each."""
        self.guided += float((guided.double() - cfg.double()).square().sum())
        self.unguided += float((unguided.double() - cfg.double()).square().sum())

    def compute(self) -> float:
        """The ratio; not a number where CFG changes nothing."""
        return self.guided / self.unguided if self.unguided else math.nan


def gain_kept(none: float, cfg: float, guided: float) -> float:
    """``(guided - none) / (cfg - none)``, the share of what CFG gains that the guide keeps.

    Above 1 the guide surpasses CFG. Not a number where CFG gains nothing.
    """
    return (guided - none) / (cfg - none) if cfg != none else math.nan


def gain_kept_interval(
    none: torch.Tensor, cfg: torch.Tensor, guided: torch.Tensor, rounds: int = 2000
) -> tuple[float, float]:
    """Between what the gain kept lies in 95 of 100 draws of as many pictures (bootstrap).

    Args:
        none: (N,) what each picture scores without guidance.
        cfg: (N,) with CFG, the same prompts and seeds.
        guided: (N,) guided.
    """
    scores = torch.stack([none, cfg, guided])
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(rounds):
        drawn = torch.randint(scores.shape[1], (scores.shape[1],), generator=generator)
        found.append(gain_kept(*scores[:, drawn].mean(1).tolist()))
    low, high = torch.tensor(found).nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def indices(prompts: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """(N,) the place of every prompt among the names.

    Raises:
        ValueError: a prompt is no name, or a name stands twice.
    """
    place = {name: i for i, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for i, name in enumerate(names) if place[name] != i)
        raise ValueError(f"the names must differ; {twice!r} stands twice")
    missing = [p for p in prompts if p not in place]
    if missing:
        raise ValueError(f"{len(missing)} prompts are not among the names: {missing[:3]}")
    return torch.tensor([place[p] for p in prompts])
