"""The metrics: retrieval accuracy, Fréchet distances, agreement with the images of CFG.

Each meter is updated batch by batch and holds sums, not images.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.stats import DegenerateDataWarning, bootstrap
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from pilotfish.data.images import to_pixels
from pilotfish.evaluation.clip import FrechetFeatures, Scorer
from pilotfish.evaluation.results import Agreement, Interval, Scores

MAX_PSNR = 100.0
"""In dB; stands for the infinite PSNR of an image with itself."""


@dataclass
class RetrievalMeter:
    """Is the prompt found among all names, from the image alone?

    Args:
        names: (K, d) unit-norm features of every name.
    """

    names: torch.Tensor
    ranks: list[torch.Tensor] = field(default_factory=list, init=False)
    cosine_sum: float = field(default=0.0, init=False)

    def update(self, images: torch.Tensor, prompt: torch.Tensor) -> None:
        """Add images.

        Args:
            images: (N, d) unit-norm features.
            prompt: (N,) the index of each image's prompt among the names.
        """
        similarity = images @ self.names.T
        own = similarity.gather(1, prompt[:, None])
        # a tie counts as a miss: a scorer to which all names look alike knows nothing
        self.ranks.append((similarity >= own).sum(1).cpu())
        self.cosine_sum += float(own.sum())

    def hits(self, k: int = 1) -> torch.Tensor:
        """(N,) 1 for every image whose prompt is among the first k names, else 0."""
        ranks = torch.cat(self.ranks) if self.ranks else torch.zeros(0)
        return (ranks <= k).float()

    def compute(self) -> tuple[float, float, float]:
        """(top-1, top-5, mean cosine); the first two in [0, 1]."""
        first, five = self.hits(), self.hits(5)
        mean = self.cosine_sum / (len(first) or math.nan)
        return float(first.mean()), float(five.mean()), mean


class FrechetMeter:
    """Fréchet distance of generated images to reference images, in the scorer's features.

    Args:
        reference: (M, 3, H, W) images in [-1, 1]; None: the distance is not a number.
    """

    def __init__(self, scorer: Scorer, reference: torch.Tensor | None) -> None:
        self.known = reference is not None
        self.distance = FrechetInceptionDistance(
            feature=FrechetFeatures(scorer), sync_on_compute=False
        )
        for part in reference.split(64) if reference is not None else ():
            self.distance.update(part, real=True)

    def update(self, images: torch.Tensor) -> None:
        """Add generated images, (N, 3, H, W) in [-1, 1]."""
        if self.known:
            self.distance.update(images, real=False)

    def compute(self) -> float:
        """The distance, at least 0.

        Raises:
            ValueError: fewer than two images on a side.
        """
        if not self.known:
            return math.nan
        counts = (self.distance.real_features_num_samples, self.distance.fake_features_num_samples)
        if min(int(n) for n in counts) < 2:
            raise ValueError("a Fréchet distance needs at least two images of each kind")
        # rounding can carry the distance of equal sets a little below 0
        return max(0.0, float(self.distance.compute()))


class ScoreMeter:
    """The scores of one model in one mode."""

    def __init__(self, scorer: Scorer, names: torch.Tensor, reference: torch.Tensor | None) -> None:
        self.retrieval, self.frechet = RetrievalMeter(names), FrechetMeter(scorer, reference)

    def update(self, images: torch.Tensor, features: torch.Tensor, prompt: torch.Tensor) -> None:
        """Add (N, 3, H, W) images, their (N, d) features, the (N,) indices of their prompts."""
        self.retrieval.update(features, prompt.to(features.device))
        self.frechet.update(images)

    def compute(self) -> Scores:
        """The scores of all images."""
        return Scores(*self.retrieval.compute(), self.frechet.compute())


class InceptionFID:
    """The usual FID, on the 2048 pooled features of Inception v3. Nothing is downloaded.

    Args:
        weights: file of torch-fidelity's Inception weights.
        reference: (M, 3, H, W) images in [-1, 1]; None: :meth:`add_reference` adds them.
        device: where the features are computed.

    Raises:
        ValueError: the file is missing or holds something else than tensors, or
            torch-fidelity is not installed.
    """

    def __init__(
        self, weights: str | Path, reference: torch.Tensor | None,
        device: str | torch.device = "cpu",
    ) -> None:  # fmt: skip
        weights = Path(weights)
        if not weights.is_file():
            raise ValueError(f"no Inception weights in {weights}: there is no such file")
        try:
            # torch-fidelity will unpickle it: first make sure that it holds tensors alone
            torch.load(weights, map_location="meta", weights_only=True)
            self.distance = FrechetInceptionDistance(
                feature=2048, feature_extractor_weights_path=str(weights), sync_on_compute=False,
                reset_real_features=False,
            ).to(device)  # fmt: skip
        except ModuleNotFoundError as error:
            raise ValueError(
                "Inception FID needs torch-fidelity: pip install 'pilotfish[inception]'"
            ) from error
        except Exception as error:  # a foreign file can fail to unpack in any way
            raise ValueError(f"{weights} holds no Inception weights") from error
        self.add_reference(() if reference is None else reference.split(32))

    def add_reference(self, batches: Iterable[torch.Tensor]) -> None:
        """Add real images, (M, 3, H, W) in [-1, 1] each; they stay after :meth:`reset`."""
        for images in batches:
            self.distance.update(to_pixels(images).to(self.distance.device), real=True)

    def update(self, images: torch.Tensor, prompts: Sequence[str] = ()) -> None:
        """Add generated images, (N, 3, H, W) in [-1, 1]."""
        self.distance.update(to_pixels(images).to(self.distance.device), real=False)

    def reset(self) -> None:
        """Forget the generated images; those of the reference stay."""
        self.distance.reset()

    def compute(self) -> float:
        """The distance."""
        return float(self.distance.compute())


@dataclass
class ClipScore:
    """CLIP score, arXiv 2104.08718: 100 times the mean cosine of image and prompt, at least 0."""

    scorer: Scorer
    cosines: list[torch.Tensor] = field(default_factory=list, init=False)

    def update(self, images: torch.Tensor, prompts: Sequence[str]) -> None:
        """Add images, (N, 3, H, W) in [-1, 1], and their N prompts."""
        cosine = self.scorer.images(images) * self.scorer.texts(list(prompts))
        self.cosines.append(cosine.sum(1).cpu())

    def compute(self) -> float:
        """The score, in [0, 100]."""
        return max(0.0, 100 * float(torch.cat(self.cosines).mean()))


@dataclass
class AgreementMeter:
    """How near images are to those of CFG from the same seeds."""

    psnr: float = field(default=0.0, init=False)
    ssim: float = field(default=0.0, init=False)
    cosine: float = field(default=0.0, init=False)
    count: int = field(default=0, init=False)

    def update(
        self, images: torch.Tensor, cfg: torch.Tensor,
        features: torch.Tensor, cfg_features: torch.Tensor,
    ) -> None:  # fmt: skip
        """Add images (N, 3, H, W) in [-1, 1] and their unit-norm features (N, d)."""
        psnr = peak_signal_noise_ratio(images, cfg, data_range=2.0, reduction="none", dim=(1, 2, 3))
        ssim = structural_similarity_index_measure(images, cfg, data_range=2.0, reduction="none")
        assert isinstance(ssim, torch.Tensor)
        self.psnr += float(psnr.clamp(max=MAX_PSNR).sum())
        self.ssim += float(ssim.sum())
        self.cosine += float((features * cfg_features).sum())
        self.count += len(images)

    def compute(self) -> Agreement:
        """Means over all images."""
        n = self.count or math.nan
        return Agreement(self.psnr / n, self.ssim / n, self.cosine / n)


@dataclass
class LatentMeter:
    """MSE(guided, cfg) / MSE(unguided, cfg) of final latents: 0 is CFG, 1 is no guide."""

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
    """``(guided - none) / (cfg - none)``, the CFG gain kept.

    Above 1 the guide surpasses CFG. Not a number where CFG gains nothing.
    """
    return (guided - none) / (cfg - none) if cfg != none else math.nan


def gain_kept_interval(
    none: torch.Tensor, cfg: torch.Tensor, guided: torch.Tensor, *, prompt: torch.Tensor,
    resamples: int = 2000,
) -> Interval:  # fmt: skip
    """The 95 % interval of the CFG gain kept, by bootstrap over prompts.

    Images of one prompt are not independent, so whole prompts are resampled (a cluster
    bootstrap). Not a number with fewer than two prompts, or where CFG gains nothing.

    Args:
        none: (N,) score of each image without guidance.
        cfg: (N,) with CFG, the same prompts and seeds.
        guided: (N,) with the guide.
        prompt: (N,) index of each image's prompt.
    """
    _, cluster = prompt.unique(return_inverse=True)
    count = int(cluster.max()) + 1
    sums = [torch.zeros(count).index_add(0, cluster, x.cpu()) for x in (none, cfg, guided)]
    if count < 2 or not (sums[1] != sums[0]).any():
        return Interval(math.nan, math.nan)

    def ratio(none: np.ndarray, cfg: np.ndarray, guided: np.ndarray, axis: int) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return (guided - none).sum(axis) / (cfg - none).sum(axis)

    with warnings.catch_warnings():  # of resamples in which CFG gains nothing
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            [x.double().numpy() for x in sums], ratio, paired=True, vectorized=True,
            n_resamples=resamples, method="percentile", rng=np.random.default_rng(0),
        )  # fmt: skip
    drawn = found.bootstrap_distribution
    low, high = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))
    return Interval(float(low), float(high))


def indices(prompts: Sequence[str], names: Sequence[str]) -> torch.Tensor:
    """(N,) the index of every prompt among the names.

    Raises:
        ValueError: a prompt is no name, or a name occurs twice.
    """
    place = {name: i for i, name in enumerate(names)}
    if len(place) < len(names):
        twice = next(name for i, name in enumerate(names) if place[name] != i)
        raise ValueError(f"the names must differ; {twice!r} occurs twice")
    missing = [p for p in prompts if p not in place]
    if missing:
        raise ValueError(f"{len(missing)} prompts are not among the names: {missing[:3]}")
    return torch.tensor([place[p] for p in prompts])
