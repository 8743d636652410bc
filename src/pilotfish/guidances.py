"""The guidances that a guide can be taught, in place of classifier-free guidance.

With c and n for the predictions for prompt and negative prompt, and d for that of a degraded
denoiser, at a scale w (:mod:`diffusers.guiders` has the same, with the same names):

    cfg            n + w (c - n), or the pipeline's own rule
    rescaled       equation (1), brought nearer to the standard deviation of c
    apg            c + (w - 1) p(c - n), where p shortens the part along c
    cfg_zero_star  s n + w (c - s n), s = <c, n> / <n, n>
    slg, pag       n + w (c - n) + r (w - 1) (c - d)
    autoguidance   d + w (c - d)

Each is c at w = 1, where pipelines make no second pass. For that the third term of ``slg`` and
``pag`` is scaled by a ratio r of w - 1. All but ``rescaled`` are then equation (1) with another
prediction in the place of n: c - p(c - n), s n, n - r (c - d) or d (:meth:`Guidance.second`). So
training, refreshes and measurements know two predictions and w.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import torch

from pilotfish.guidance import (
    projected_unconditional,
    rescaled_guidance,
    scaled_unconditional,
)

Rule = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]
"""(unconditional, conditional, w) -> the guided prediction."""

Name = Literal["cfg", "rescaled", "apg", "cfg_zero_star", "slg", "pag", "autoguidance"]
LAYERS = ("slg", "pag", "autoguidance")
"""Those with a degraded denoiser."""
TITLES: dict[str, str] = {
    "cfg": "CFG", "rescaled": "rescaled CFG", "apg": "APG", "cfg_zero_star": "CFG-Zero*",
    "slg": "skip-layer guidance", "pag": "perturbed-attention guidance",
    "autoguidance": "AutoGuidance",
}  # fmt: skip
SETTINGS: dict[str, tuple[str, ...]] = {
    "cfg": (), "rescaled": ("guidance_rescale",), "apg": ("eta", "norm_threshold"),
    "cfg_zero_star": (), "slg": ("degraded_scale", "degraded_layers"),
    "pag": ("degraded_scale", "degraded_layers"),
    "autoguidance": ("weak_model", "weak_prompt", "degraded_layers"),
}  # fmt: skip
"""The settings that each guidance has."""


@dataclass(frozen=True)
class Guidance:
    """Which guidance a teacher uses, and its settings. Those of another guidance must be left out.

    Raises:
        ValueError: a setting that the guidance does not have, or one out of its range.
    """

    guidance: Name = "cfg"
    """cfg: the pipeline's own classifier-free guidance. rescaled: guidance_rescale of diffusers.
    apg: adaptive projected guidance, without momentum. cfg_zero_star: CFG-Zero* without zeroed
    steps. slg, pag: skip-layer and perturbed-attention guidance beside CFG, three passes.
    autoguidance: a weaker denoiser makes the second pass."""
    guidance_rescale: float = 0.7
    """rescaled: share of the rescaled prediction, 0 (CFG) to 1."""
    eta: float = 0.0
    """apg: share of the part along the conditional prediction that is kept; 1 keeps all."""
    norm_threshold: float = 0.0
    """apg: largest norm of the difference of the two predictions; 0 for none."""
    degraded_scale: float = 0.5
    """slg, pag: scale of the third pass, as a ratio of w - 1."""
    degraded_layers: tuple[str, ...] = ()
    """slg, pag, autoguidance: names of the transformer blocks that are skipped (pag: whose
    self-attention is), such as transformer_blocks.7. Default: those of a UNet's mid block."""
    weak_model: str | None = None
    """autoguidance: folder or hub id of a weaker pipeline or denoiser on the same latents and
    texts. Default: the base itself with its degraded_layers skipped."""
    weak_prompt: Literal["negative", "prompt"] = "negative"
    """autoguidance: what the weaker denoiser reads, the negative prompt as in diffusers or the
    prompt as in the paper."""

    def __post_init__(self) -> None:
        if self.guidance not in get_args(Name):
            raise ValueError(f"guidance must be one of {', '.join(get_args(Name))}")
        own = ("guidance", *SETTINGS[self.guidance])
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name not in own and value != f.default:
                owners = ", ".join(name for name, known in SETTINGS.items() if f.name in known)
                raise ValueError(
                    f"{f.name} is a setting of guidance {owners}, and {self.guidance} has none"
                )
            if isinstance(value, int | float) and not 0 <= value < float("inf"):
                raise ValueError(f"{f.name} must be at least 0 and finite, not {value}")
        for name in ("guidance_rescale", "eta"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, not {getattr(self, name)}")
        if self.weak_model is not None and self.degraded_layers:
            raise ValueError("give weak_model or degraded_layers, not both")

    @classmethod
    def saved(cls, plain: Mapping[str, Any] | None) -> Self:
        """That of :meth:`plain`; None is CFG.

        Raises:
            ValueError: it has unknown fields, or as the class.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(plain or {}) - known):
            raise ValueError(f"a guidance has no field {unknown[0]}")
        given: dict[str, Any] = {}
        for name, value in (plain or {}).items():
            given[name] = tuple(value) if isinstance(value, list) else value
        return cls(**given)

    def plain(self) -> dict[str, Any] | None:
        """Its name and own settings in plain JSON; None for CFG."""
        if self.guidance == "cfg":
            return None
        found = {n: getattr(self, n) for n in ("guidance", *SETTINGS[self.guidance])}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}

    def __str__(self) -> str:
        settings = [f"{n} {getattr(self, n)}" for n in SETTINGS[self.guidance] if getattr(self, n)]
        return ", ".join([self.guidance, *settings])

    @property
    def title(self) -> str:
        """Its name in tables."""
        return TITLES[self.guidance]

    # -- its passes ---------------------------------------------------------------------------

    @property
    def degrades(self) -> bool:
        """Whether a degraded denoiser takes part."""
        return self.guidance in LAYERS and (self.replaces_second or self.degraded_scale > 0)

    @property
    def replaces_second(self) -> bool:
        """Whether its pass is the second, and not a third."""
        return self.guidance == "autoguidance"

    @property
    def passes(self) -> int:
        """Of a step."""
        return 3 if self.degrades and not self.replaces_second else 2

    def second(
        self, unconditional: torch.Tensor, conditional: torch.Tensor,
        degraded: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """What takes the place of the unconditional prediction, (N, ...) as all of them.

        Args:
            degraded: that of the degraded denoiser, where one takes part.
        """
        if self.guidance == "cfg_zero_star":
            return scaled_unconditional(unconditional, conditional)
        if self.guidance == "apg":
            return projected_unconditional(
                unconditional, conditional, self.eta, self.norm_threshold
            )  # fmt: skip
        if degraded is None:
            return unconditional
        if self.replaces_second:
            return degraded
        return unconditional - self.degraded_scale * (conditional - degraded)

    def combine(
        self, second: torch.Tensor, conditional: torch.Tensor, w: torch.Tensor | float, rule: Rule
    ) -> torch.Tensor:
        """The guided prediction, (N, ...).

        Args:
            second: of :meth:`second`.
            w: a number or (N,).
            rule: the pipeline's own, which ``rescaled`` replaces.
        """
        if self.guidance == "rescaled":
            return rescaled_guidance(second, conditional, w, self.guidance_rescale)
        return rule(second, conditional, w)


CFG = Guidance()
