"""PilotfishGuidance: a guide as the guider of a modular pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import register_to_config

from pilotfish.backbones import Backbone, Origin, is_compiled, watch_hooks
from pilotfish.guides import Guide
from pilotfish.interface import GuideError, GuideProtocol
from pilotfish.modular.call import (
    Call,
    Conditions,
    negative_prompts,
    refresh_plan,
    same_schedule,
    schedule_of,
    warn_of_training,
)
from pilotfish.modular.contract import check_guiders
from pilotfish.modular.placed import PlacedHooks
from pilotfish.refresh import RefreshSteps, check_refresh

try:
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
except ImportError:
    BaseGuidance = None
check_guiders(BaseGuidance, diffusers.__version__)


@dataclass
class _Shared:
    """What a guider and those made of it by :meth:`PilotfishGuidance.new` have in common.

    Attributes:
        guide: with its weights, once it is loaded.
        call: the running one.
    """

    guide: Guide | None = None
    call: Call | None = None


class PilotfishGuidance(BaseGuidance):
    """Guidance by a guide: one denoiser call a step, on the prompts alone.

    It takes the place of ``ClassifierFreeGuidance`` in a modular pipeline whose denoiser belongs to
    a family of :mod:`pilotfish.backbones`. It asks for two conditions, so that the pipeline encodes
    the negative prompt, and runs one. Its configuration is all that is saved of it.

    Args:
        guide: path or hub id of the guide, which is loaded at the first guided step.
        guidance_scale: the scale, in the convention of the denoiser's standard pipeline: at 1
            (Z-Image: at 0) there is no guidance. It may be changed between two steps.
        refresh: how many of the guided steps run both passes; what ratio of them, as a float; or
            which steps of the call, counted from 0. Left out: the ratio that the guide's
            configuration names.
        use_original_formulation: whether the scale is w - 1, as in ``ClassifierFreeGuidance``.
            Left out: that of the standard pipeline, so True for Z-Image and False for all others.
        start: the part of the steps, 0 to 1, after which guidance starts.
        stop: the part of the steps, 0 to 1, after which it stops.
        enabled: whether there is guidance at all.
        subfolder: of the guide.
        revision: of the guide on the hub.

    Raises:
        GuideError: ``guide`` is no path or id, or ``refresh`` is none of those. In a call: the
            guide cannot be read or was made for another denoiser, the denoiser takes no guide, or
            no negative prompt was encoded.
    """

    _input_predictions = ["pred_cond"]  # noqa: RUF012 - BaseGuidance asks for a list

    @register_to_config
    def __init__(
        self,
        guide: str | PathLike[str],
        *,
        guidance_scale: float = 4.0,
        refresh: RefreshSteps | None = None,
        use_original_formulation: bool | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        subfolder: str | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__(start, stop, enabled)
        if not isinstance(guide, str | PathLike):
            raise GuideError(
                f"guide must be a path or a hub id, not a {type(guide).__name__}: a guider saves "
                "no weights; save the guide with save_pretrained and give its folder"
            )
        # diffusers takes an argument without its name for a default, which it does not load again
        defaults = [n for n in self.config.get("_use_default_values", ()) if n != "guide"]
        self.register_to_config(guide=str(guide), _use_default_values=defaults)
        self.guidance_scale = guidance_scale
        self.use_original_formulation = use_original_formulation
        self.refresh = None if refresh is None else check_refresh(refresh)
        self._shared = _Shared()
        self._conditions: Conditions = {}
        self._schedule: torch.Tensor | None = None
        self._place: int | None = None  # of the running step in it
        self._call: Call | None = None
        self._placed: PlacedHooks | None = None

    def new(self, **kwargs: Any) -> PilotfishGuidance:
        """Another guider with these changes to the configuration. It shares the weights of the same
        guide; in a pipeline with two guiders also what the last refresh found."""
        made: PilotfishGuidance = super().new(**kwargs)
        if all(made.config[name] == self.config[name] for name in _LOADED):
            made._shared = self._shared
        return made

    def disable(self) -> None:
        super().disable()
        self._end_call()

    # -- what the pipeline asks ---------------------------------------------------------------

    @property
    def requires_unconditional_embeds(self) -> bool:
        """Whether the pipeline is to encode the negative prompt. It asks before the first step, so
        ``start`` and ``stop`` do not count, nor does the denoiser's convention."""
        lowest = 1.0 if self.use_original_formulation is False else 0.0
        return bool(self._enabled and self.guidance_scale > lowest)

    @property
    def num_conditions(self) -> int:
        """2 where the negative prompt is needed; the denoiser is called once all the same."""
        return 2 if self.requires_unconditional_embeds else 1

    @property
    def is_conditional(self) -> bool:
        return True

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """A step begins; the first of a call, where it does not follow the one before."""
        schedule = schedule_of(timestep)
        follows = step > 0 and step in (self._step, (self._step or 0) + 1)
        if not (
            follows
            and num_inference_steps == self._num_inference_steps
            and (schedule is None or same_schedule(schedule, self._schedule))
        ):
            self._end_call()
            self._schedule = schedule
        self._place = None if schedule is None else int(timestep.storage_offset())
        super().set_state(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: Any) -> list[Any]:
        """The conditions of the prompts alone; those of the negative prompts are kept."""
        self._conditions = {k: v for k, v in data.items() if isinstance(v, tuple)}
        return [self._prepare_batch(data, 0, "pred_cond")]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        """As :meth:`prepare_inputs`, of the fields of a block's state."""
        self._conditions = {
            name: (getattr(data, names[0], None), getattr(data, names[1], None))
            for name, names in input_fields.items()
            if isinstance(names, tuple)
        }
        return [self._prepare_batch_from_block_state(input_fields, data, 0, "pred_cond")]

    def __call__(self, data: list[Any]) -> Any:
        (one,) = data
        return self.forward(one.noise_pred)

    def forward(self, pred_cond: torch.Tensor) -> Any:
        """The prediction as it is: the guide has acted inside the denoiser. Pipelines that bring it
        to the norm of ``pred_cond`` multiply it by 1."""
        return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)

    # -- one step -----------------------------------------------------------------------------

    def prepare_models(self, denoiser: Any) -> None:
        """Put the guide's hooks on the denoiser, if the step is guided."""
        super().prepare_models(denoiser)
        first, end = self._guided_steps()
        if not (self._enabled and first <= self._step < end):
            return self._end_call()
        backbone = Backbone.of(denoiser)
        offset = self._offset(backbone)
        scale = self.guidance_scale + offset
        if not abs(scale) <= torch.finfo(torch.float32).max:
            raise GuideError(f"guidance_scale must be a finite number, not {self.guidance_scale}")
        if scale <= 1:
            return self._end_call()
        began, call = self._call is None, self._call or self._begin_call(backbone)
        if began:
            self._call = self._shared.call = call
            warn_of_training(call.guide, backbone, scale, offset, self._schedule)
        call.scale, call.place = scale, self._place
        call.take(self._conditions, backbone)
        self._hooks_on(denoiser, backbone, call.guide, began).put(call.guided)
        return None

    def cleanup_models(self, denoiser: Any) -> None:
        """Lift the hooks off the denoiser."""
        super().cleanup_models(denoiser)
        if self._placed is not None:
            self._placed.lift()
        if self._place is None or self._schedule is None:
            last = self._step + 1 >= self._num_inference_steps
        else:  # which holds for solvers with several calls in a step, too
            last = self._place + 1 == len(self._schedule)
        if last:
            self._end_call()

    def _begin_call(self, backbone: Backbone) -> Call:
        """The first guided step: the guide on the device of the prompts, in the denoiser's
        precision. The call of the guider before, where this one takes over from it."""
        place = negative_prompts(self._conditions, backbone).device
        guide = self._load(place, backbone.denoiser.dtype)
        before = self._shared.call
        if (
            before is not None
            and before.guide is guide
            and same_schedule(before.schedule, self._schedule)
        ):
            return before
        plan = refresh_plan(
            guide.refresh_ratio if self.refresh is None else self.refresh,
            self._num_inference_steps,
            self._guided_steps(),
            few_steps=guide.times is not None,
        )
        return Call(guide, self._schedule, tuple(s - self._step for s in plan if s >= self._step))

    def _load(self, device: torch.device, dtype: torch.dtype) -> Guide:
        guide = self._shared.guide
        if guide is None or (guide.device, guide.dtype) != (device, dtype):
            where = {k: v for k in _LOADED[1:] if (v := self.config[k]) is not None}
            guide = Guide.from_pretrained(self.config.guide, **where).to(device, dtype).eval()
            self._shared.guide = guide
        return guide

    def _hooks_on(
        self, denoiser: Any, backbone: Backbone, guide: GuideProtocol, began: bool
    ) -> PlacedHooks:  # fmt: skip
        """Those of the guide on a denoiser, placed where they are not there yet.

        Args:
            began: whether this is the first guided step; a LoRA may have been loaded before it.
        """
        placed = self._placed
        if placed is not None and placed.denoiser is denoiser and (not began or placed.fit(guide)):
            return placed
        if (why := backbone.refusal(None)) is not None:
            raise GuideError(f"this denoiser cannot take a guide: {why}")
        # a guider does not see the scheduler, so what the denoiser predicts is not compared
        predicted = guide.config.signature.get("prediction_type")
        guide.check(backbone.signature(predicted), Origin.of(backbone.denoiser))
        if is_compiled(denoiser):
            watch_hooks(len(guide.extrapolated) + len(guide.target_modules))
        self._placed = PlacedHooks(guide, backbone, denoiser, self._end_call)
        return self._placed

    def _end_call(self) -> None:
        """Keep nothing of the call but, where the denoiser is compiled, its hooks."""
        if self._call is not None:
            self._call.end()  # the guider before this one may have it, too
            if self._shared.call is self._call:
                self._shared.call = None
        self._call = None
        if self._placed is not None:
            self._placed.lift()
            self._placed = self._placed if self._placed.compiled else None

    def _guided_steps(self) -> tuple[int, int]:
        """The first guided step, and that after the last."""
        steps = self._num_inference_steps
        return int(self._start * steps), int(self._stop * steps)

    def _offset(self, backbone: Backbone) -> float:
        """What is added to the scale to give w."""
        original = self.use_original_formulation
        return backbone.scale_offset if original is None else float(original)


_LOADED = ("guide", "subfolder", "revision")
"""The fields of the configuration that say which guide it is."""

# Indexes of modular pipelines name the library of a class by its module, and diffusers takes only
# what is imported already: so that ``import pilotfish`` is enough
PilotfishGuidance.__module__ = "pilotfish"
