"""A guidance with all its passes in every step: what a guide that was taught it is compared with.

It runs as a refresh does, on any pipeline that takes a guide.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

from torch import nn

from pilotfish.backbones import Backbone
from pilotfish.guidances import Guidance
from pilotfish.interface import GuideError, GuideInputs, GuideOutput
from pilotfish.noise import prediction_type
from pilotfish.pipelines.attach import attached
from pilotfish.pipelines.loading import weaker_denoiser


@dataclass(frozen=True)
class Reference:
    """A guidance, for whoever samples with it, such as
    :func:`~pilotfish.pipelines.sampling.sample`. CFG is the pipeline's own.
    """

    guidance: Guidance

    def attached(self, pipe: Any) -> AbstractContextManager[Any]:
        """The pipeline with it, until the block ends.

        Raises:
            GuideError: the pipeline takes no guide, or has two denoisers and the guidance a weaker
                model.
        """
        if self.guidance.guidance == "cfg":
            return nullcontext(pipe)
        return attached(_NoGuide.on(pipe, self.guidance), pipe, refresh=1.0)


class _NoGuide:
    """Adds nothing."""

    guidance_scale_range = (1.0, float("inf"))
    times = None
    refresh_ratio = 1.0
    corrects_refresh = False
    target_modules = extrapolated = ()
    joint_attention, image_tokens, negative_stream = "whole", 0, "joint"

    def __init__(self, guidance: Guidance, weak: nn.Module | None, predicted: str) -> None:
        self.guidance, self.weak_denoiser = guidance, weak
        self.config = SimpleNamespace(signature={"prediction_type": predicted})
        self.device: Any = None
        self.dtype: Any = None

    @classmethod
    def on(cls, pipe: Any, guidance: Guidance) -> Self:
        """One for the denoiser of a pipeline."""
        backbone, *others = Backbone.all_of_pipeline(pipe).values()
        if others and guidance.weak_model is not None:
            raise GuideError(f"{type(pipe).__name__} has two denoisers, and weak_model is one")
        weak = weaker_denoiser(guidance, backbone)
        made = cls(guidance, weak, prediction_type(pipe.scheduler))
        return made.to(pipe._execution_device, backbone.denoiser.dtype)

    def to(self, device: Any, dtype: Any) -> Self:
        """With the weaker model, where there is one."""
        self.device, self.dtype = device, dtype
        if self.weak_denoiser is not None:
            nn.Module.to(self.weak_denoiser, device, dtype)
        return self

    def eval(self) -> Self:
        return self

    def parameters(self) -> tuple[()]:
        return ()

    def check(self, signature: Any, used_on: Any = None) -> None:
        """It fits every denoiser."""

    def modulations(self, *_: Any, **__: Any) -> None:
        return None

    def __call__(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        return GuideOutput()
