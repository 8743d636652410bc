"""One object that feeds the table, the JSON, the plots and the report."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from pilotfish.evaluation.saved import Saved
from pilotfish.guidance_error import GuidanceError


@dataclass(frozen=True)
class Scores:
    """How good pictures are.

    Attributes:
        prompt_score: share of pictures whose own name is found first among all, in [0, 1].
        top5: share whose own name is among the first five, in [0, 1].
        cosine: mean cosine of picture and own name, in [-1, 1].
        fd_judge: Fréchet distance to real pictures in the judge's features, at least 0.
    """

    prompt_score: float
    top5: float
    cosine: float
    fd_judge: float


@dataclass(frozen=True)
class Agreement:
    """Means over pictures against the CFG picture of the same seed: PSNR in dB (at most 100),
    SSIM, and the cosine of the judge's features."""

    psnr: float
    ssim: float
    cosine: float


@dataclass(frozen=True)
class Interval:
    """Between two values."""

    low: float
    high: float


@dataclass(frozen=True)
class HostResult:
    """One host: a base or a fine-tune, against its own CFG.

    Attributes:
        latent_mse_ratio: MSE(guided, cfg) / MSE(unguided, cfg) of final latents.
        gain_kept: (guided - none) / (cfg - none) in prompt score.
        gain_kept_cosine: the same in mean cosine.
        agreement: with the CFG picture, of ``guided`` and of ``none``.
        more: further scores by name, then by way, such as ``{"fid": {"cfg": ...}}``.
        gain_kept_interval: 95 % interval of the gain kept, over the choice of pictures; not a
            number in results from before it was measured.
    """

    guidance_error: GuidanceError
    latent_mse_ratio: float
    gain_kept: float
    gain_kept_cosine: float
    none: Scores
    cfg: Scores
    guided: Scores
    agreement: dict[str, Agreement]
    more: dict[str, dict[str, float]] = field(default_factory=dict)
    gain_kept_interval: Interval = field(default_factory=lambda: Interval(math.nan, math.nan))


@dataclass(frozen=True)
class GuideSize:
    """Which guide; its parameters, and their share of the denoiser's."""

    name: str
    parameters: int
    share: float


@dataclass(frozen=True)
class Cost:
    """What each way of guidance costs; ratios are keyed by batch size.

    Attributes:
        cfg_over_guided: wall clock, median of interleaved runs.
        cfg_over_plain: the same, against one pass without a guide.
        flops: of one sampling step for one picture: ``plain``, ``cfg``, ``guided``.
        passes: of the denoiser for one picture: ``plain``, ``cfg``, ``guided``.
        seconds: median for a whole batch, by batch size and way.
    """

    cfg_over_guided: dict[str, float]
    cfg_over_plain: dict[str, float]
    flops: dict[str, int]
    passes: dict[str, float]
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """How to repeat it. ``machine`` is the processor's model and the number of threads."""

    command: str
    seed: int
    samples: int
    guidance_scale: float
    num_inference_steps: int
    machine: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Result(Saved):
    """Everything that was measured of one guide."""

    hosts: dict[str, HostResult]
    guide: GuideSize
    cost: Cost
    run: Run
