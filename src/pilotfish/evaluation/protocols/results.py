"""What a protocol measured."""

from __future__ import annotations

from dataclasses import dataclass

from pilotfish.evaluation.results import GuideSize, Interval, Saved


@dataclass(frozen=True)
class Gain:
    """A score, and the share of CFG's gain in it.

    Attributes:
        mean: over the images.
        kept: (method - none) / (cfg - none); not a number for none and CFG.
        interval: its 95 % interval, over the choice of prompts.
    """

    mean: float
    kept: float
    interval: Interval


@dataclass(frozen=True)
class ProtocolRow:
    """A method on a model.

    Attributes:
        title: of the method.
        passes: of the denoiser for an image, counted.
        scores: ``clip_score`` (100 times the cosine of image and prompt) and ``pickscore``, as far
            as they are measured.
        fid: to the reference images; not a number where it is not measured.
    """

    title: str
    passes: float
    scores: dict[str, Gain]
    fid: float


@dataclass(frozen=True)
class ComplianceRow:
    """A method on a model with negative prompts. Similarities are 100 times the cosine of CLIP.

    Attributes:
        title: of the method.
        passes: of the denoiser for an image with a negative prompt, counted.
        without: similarity of image and negative prompt where the prompt is given alone.
        with_negative: the same where the negative prompt is given as well.
        suppression: ``without - with_negative``.
        kept: suppression over that of CFG; not a number for CFG.
        interval: its 95 % interval, over the choice of prompts.
        clip_score: similarity of image and prompt where the negative prompt is given.
    """

    title: str
    passes: float
    without: float
    with_negative: float
    suppression: float
    kept: float
    interval: Interval
    clip_score: float


@dataclass(frozen=True)
class ProtocolRun:
    """How to repeat it.

    Attributes:
        protocol: its name.
        prompts: their number and checksum.
        reference_images: number of the real images; 0 without FID.
        guidance_scale: w.
        schedulers: class by model.
        clip: of the CLIP score and the similarities, the start of the SHA-256 of its weights.
        pickscore: the same of PickScore; empty where it is not measured.
    """

    command: str
    protocol: str
    prompts: str
    reference_images: int
    seed: int
    samples: int
    guidance_scale: float
    num_inference_steps: int
    schedulers: dict[str, str]
    dtype: str
    clip: str
    pickscore: str
    machine: str
    versions: dict[str, str]


@dataclass(frozen=True)
class ProtocolResult(Saved):
    """The rows by model and method."""

    models: dict[str, dict[str, ProtocolRow]]
    guides: dict[str, GuideSize]
    run: ProtocolRun


@dataclass(frozen=True)
class ComplianceResult(Saved):
    """The rows with negative prompts by model and method."""

    models: dict[str, dict[str, ComplianceRow]]
    guides: dict[str, GuideSize]
    run: ProtocolRun
