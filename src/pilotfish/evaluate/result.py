"""One object that feeds the table, the JSON, the plots and the report."""

from __future__ import annotations

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ResultError(ValueError):
    """A saved result cannot be read; the message names the field."""


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
class GuidanceError:
    """0 is perfect, 1 is no guide. ``mean`` is over w; timesteps are keys from last to first."""

    mean: float
    by_w: dict[str, float]
    by_timestep: dict[str, float]


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
        gain_kept_interval: its 95 % interval, over the choice of pictures.
        gain_kept_cosine: the same in mean cosine.
        agreement: with the CFG picture, of ``guided`` and of ``none``.
        more: further scores by name, then by way, such as ``{"fid": {"cfg": ...}}``.
    """

    guidance_error: GuidanceError
    latent_mse_ratio: float
    gain_kept: float
    gain_kept_interval: Interval
    gain_kept_cosine: float
    none: Scores
    cfg: Scores
    guided: Scores
    agreement: dict[str, Agreement]
    more: dict[str, dict[str, float]] = field(default_factory=dict)


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
class Result:
    """Everything that was measured of one guide."""

    hosts: dict[str, HostResult]
    guide: GuideSize
    cost: Cost
    run: Run

    def to_json(self) -> str:
        """Strict JSON; what is not a number is null."""
        return json.dumps(_nulls(asdict(self)), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what :meth:`to_json` wrote.

        Raises:
            ResultError: no JSON, a field that is missing, unknown or of another kind.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ResultError(f"the result is no JSON: {error}") from error
        return _build(cls, values, "result")

    def save(self, path: str | Path) -> None:
        """Write as JSON, all of it or nothing: a file that was there stays until the end."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

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


def _nulls(value: Any) -> Any:
    """JSON has no word for what is not a number."""
    if isinstance(value, dict):
        return {k: _nulls(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _build(kind: type[T], value: Any, where: str) -> T:
    """A value of ``kind`` from parsed JSON; ``where`` names the place in errors."""
    made: Any
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise ResultError(f"{where} must be an object")
        hints = get_type_hints(kind)
        if unknown := sorted(set(value) - set(hints)):
            raise ResultError(f"{where} has unknown fields: {', '.join(unknown)}")
        optional = {f.name for f in fields(kind) if callable(f.default_factory)}
        if missing := [n for n in hints if n not in value and n not in optional]:
            raise ResultError(f"{where} lacks {', '.join(missing)}")
        made = kind(**{n: _build(hints[n], v, f"{where}.{n}") for n, v in value.items()})
    elif get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise ResultError(f"{where} must be an object")
        inner = get_args(kind)[1]
        made = {k: _build(inner, v, f"{where}.{k}") for k, v in value.items()}
    elif kind is float:
        made = math.nan if value is None else value
        if isinstance(made, bool) or not isinstance(made, int | float):
            raise ResultError(f"{where} must be a number, not {value!r}")
        made = float(made)
    else:
        if isinstance(value, bool) or not isinstance(value, kind):
            raise ResultError(f"{where} must be of type {kind.__name__}, not {value!r}")
        made = value
    return made  # type: ignore[no-any-return]
