"""What was measured, as dataclasses, and as JSON files.

A file is written whole or not at all, and is validated when it is read. Values that are not a
number are null in JSON.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from pilotfish.backbones import Backbone
from pilotfish.data.text_files import write_text
from pilotfish.evaluation.processes import is_main, on_main
from pilotfish.guidance_error import GuidanceError
from pilotfish.teacher import checksum

T = TypeVar("T")
PACKAGES = ("pilotfish", "torch", "diffusers", "transformers", "torchmetrics")


class ResultError(ValueError):
    """A result cannot be read; the message names the field."""


class Saved:
    """A dataclass of numbers, texts, dicts and further dataclasses that can be saved."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    def to_json(self) -> str:
        """Strict JSON."""
        return TypeAdapter(type(self)).dump_json(self, indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The result that :meth:`to_json` wrote.

        Raises:
            ResultError: no JSON; a field that is missing, unknown or of another type.
        """
        try:
            return _validated(cls, json.loads(text))
        except json.JSONDecodeError as error:
            raise ResultError(f"the result is no JSON: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a saved result.

        Raises:
            ResultError: the file cannot be read, or holds no result.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ResultError) as error:
            raise ResultError(f"no result could be read from {path}: {error}") from error


@dataclass(frozen=True)
class Scores:
    """How good images are.

    Attributes:
        top1: retrieval accuracy: share of images whose prompt is the first of all names.
        top5: share of images whose prompt is among the first five.
        cosine: mean cosine of image and prompt, in [-1, 1].
        fd_clip: Fréchet distance to reference images in the scorer's features, at least 0.
    """

    top1: float
    top5: float
    cosine: float
    fd_clip: float


@dataclass(frozen=True)
class Agreement:
    """Means over images against those of CFG from the same seeds: PSNR in dB (at most 100),
    SSIM, and the cosine of the scorer's features."""

    psnr: float
    ssim: float
    cosine: float


@dataclass(frozen=True)
class Interval:
    """Between two values."""

    low: float
    high: float


@dataclass(frozen=True)
class ModelResult:
    """One model, the base or a fine-tune, against its own CFG.

    Attributes:
        latent_mse_ratio: MSE(guided, cfg) / MSE(unguided, cfg) of final latents.
        gain_kept: (guided - none) / (cfg - none) in top-1 accuracy.
        gain_kept_interval: its 95 % interval, over the choice of prompts.
        gain_kept_cosine: the same in mean cosine.
        scores: by guidance mode.
        agreement: with the images of CFG, of ``guided`` and of ``none``.
        more: further scores by name, then by mode, such as ``{"fid": {"cfg": ...}}``.
    """

    guidance_error: GuidanceError
    latent_mse_ratio: float
    gain_kept: float
    gain_kept_interval: Interval
    gain_kept_cosine: float
    scores: dict[str, Scores]
    agreement: dict[str, Agreement]
    more: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class GuideSize:
    """Which guide; its parameters, and their share of the denoiser's."""

    name: str
    parameters: int
    share: float

    @classmethod
    def of(cls, guide: nn.Module, pipe: Any, name: str) -> Self:
        """The size of a guide beside the denoiser of a pipeline."""
        denoiser = Backbone.of_pipeline(pipe).denoiser
        own, whole = (sum(p.numel() for p in m.parameters()) for m in (guide, denoiser))
        return cls(name, own, own / whole)


@dataclass(frozen=True)
class Cost:
    """The cost of each guidance mode. Ratios are by batch size.

    Attributes:
        cfg_over_guided: wall clock, median over rounds in which the modes take turns.
        cfg_over_none: the same, against one pass without guidance.
        flops: of one sampling step for one image, by mode.
        passes: of the denoiser for one image, by mode.
        seconds: median for a whole batch, by batch size and mode.
    """

    cfg_over_guided: dict[str, float]
    cfg_over_none: dict[str, float]
    flops: dict[str, int]
    passes: dict[str, float]
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """How to repeat it. ``machine`` is the processor's model and the number of threads,
    ``refresh`` the steps of the guide that run both passes: how many, what ratio, or
    which; None: each guide has its own ratio. ``guidance`` is what the guide was taught, which is
    called CFG in the figures."""

    command: str
    seed: int
    samples: int
    guidance_scale: float
    num_inference_steps: int
    machine: str
    versions: dict[str, str]
    dtype: str = "float32"
    refresh: int | float | list[int] | None = 0
    guidance: str = "cfg"

    @property
    def refreshes(self) -> str:
        """The steps of the guide that run both passes, in words."""
        if self.refresh is None:
            return "both passes in the ratio of each guide"
        if not self.refresh:
            return "one pass in each step of the guide"
        if isinstance(self.refresh, list):
            return f"both passes in the steps {', '.join(map(str, self.refresh))}"
        if isinstance(self.refresh, float):
            return f"both passes in {self.refresh:.0%} of the guide's steps"
        return f"both passes in {self.refresh} of the guide's steps"


@dataclass(frozen=True)
class Result(Saved):
    """A guide on several models, and its cost on the first."""

    models: dict[str, ModelResult]
    guide: GuideSize
    cost: Cost
    run: Run


@dataclass(frozen=True)
class Point:
    """The scores of one setting, and the denoiser passes of an image."""

    passes: float
    scores: Scores


@dataclass(frozen=True)
class CurveResult(Saved):
    """Scores against a setting.

    Attributes:
        setting: ``num_inference_steps`` or ``guidance_scale``.
        models: by model, mode or method, and value of the setting.
        wall_clock: by mode or method and value: a call on the first model, relative to that of
            CFG at the largest value. Empty for ``guidance_scale``, which changes nothing.
        guides: the size of each guide; ``NAME-N`` where several guides are one method, each
            for N steps.
        run: the largest value of the setting is in it.
    """

    setting: str
    models: dict[str, dict[str, dict[str, Point]]]
    wall_clock: dict[str, dict[str, float]]
    guides: dict[str, GuideSize]
    run: Run


@dataclass(frozen=True)
class NegativeModel:
    """One model with negative prompts, against its own CFG with the same ones. The guide is
    conditioned on the negative prompts (``conditioned``) or on the null prompt (``ignoring``).

    Attributes:
        null: guidance error with the null prompt, of CFG and guide.
        conditioned: guidance error with the negative prompts.
        ignoring: the same, of the guide conditioned on the null prompt.
        ratio: the mean error ``conditioned`` over ``null``.
        ratio_ignoring: the mean error ``ignoring`` over ``null``.
        latent_mse_ratio: MSE(conditioned, cfg) / MSE(ignoring, cfg) of final latents.
        agreement: with the images of CFG, of ``conditioned`` and of ``ignoring``; ``null``: of
            guide and CFG both with the null prompt. ``none`` and ``none_null``: of images without
            guidance with those of CFG with the negative and with the null prompt.
    """

    null: GuidanceError
    conditioned: GuidanceError
    ignoring: GuidanceError
    ratio: float
    ratio_ignoring: float
    latent_mse_ratio: float
    agreement: dict[str, Agreement]


@dataclass(frozen=True)
class NegativeResult(Saved):
    """A guide with negative prompts on several models."""

    models: dict[str, NegativeModel]
    guide: GuideSize
    run: Run


class PartialResults:
    """The finished parts of a measurement in a file, from which the same measurement resumes.

    A part is known by all facts that it depends on: with other weights or settings, on another
    machine or with other versions it is measured again. Of several processes the first reads and
    writes.

    Args:
        file: None: nothing is kept. A file that cannot be read is overwritten.
    """

    def __init__(self, file: str | Path | None) -> None:
        self.file = Path(file) if file is not None else None
        self.parts: dict[str, Any] = on_main(self._read)

    def checksums(self, networks: Mapping[str, nn.Module]) -> dict[str, str]:
        """The weights of networks, as facts; nothing where no part is kept."""
        if self.file is None:
            return {}
        return on_main(lambda: {name: checksum(module) for name, module in networks.items()})

    def get(self, kind: type[T], facts: Mapping[str, Any], measure: Callable[[], T]) -> T:
        """The part of some facts (plain values, distinguished by their ``repr``); measured, and
        saved at once, if it is not there."""
        if self.file is None:
            return measure()
        text = repr((kind.__name__, sorted(facts.items()), machine(), versions()))
        key = on_main(lambda: sha256(text.encode()).hexdigest())
        try:
            return _validated(kind, self.parts[key])
        except (KeyError, ResultError):
            made = measure()
        self.parts[key] = json.loads(TypeAdapter(kind).dump_json(made))
        if is_main():
            write_text(self.file, json.dumps(self.parts, indent=1))
        return made

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.file.read_text(encoding="utf-8")) if self.file else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def modules(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline by name."""
    return {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}


def machine() -> str:
    """The processor's model, the threads in use, the accelerator if there is one."""
    threads = torch.get_num_threads()
    words = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{words}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else words


def versions() -> dict[str, str]:
    """Python's version and those of the packages on which the figures depend."""
    found = {"python": ".".join(str(n) for n in sys.version_info[:3])}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown processor"


def _validated(kind: type[T], value: Any) -> T:
    try:
        # strict validation accepts dicts for dataclasses in JSON alone
        return TypeAdapter(kind).validate_json(json.dumps(_nulls_to_nan(value)))
    except ValidationError as error:
        first, *others = error.errors()
        more = f" (and {len(others)} more)" if others else ""
        where = ".".join(map(str, first["loc"])) or "the result"
        raise ResultError(f"{where}: {first['msg']}{more}") from error


def _nulls_to_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _nulls_to_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_nulls_to_nan(v) for v in value]
    return math.nan if value is None else value
