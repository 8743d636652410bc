"""What goes on while a guided call runs: at every pass, and in callbacks between two steps."""

from __future__ import annotations

import warnings
from inspect import BoundArguments
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks

from pilotfish.backbones import GuidedPass
from pilotfish.interface import GuideError, GuideLike, TextConditions
from pilotfish.pipelines.fitting import sit

TEXT, POOLED = "prompt_embeds", "add_text_embeds"
"""Conditions of which a doubled batch has the negative prompt's in its first half."""


class Watch:
    """Refuses a second pass of another kind; warns once in a call when a guide distilled to few
    steps is asked for others."""

    def __init__(self, guide: GuideLike, pipe: Any) -> None:
        self.known, self.pipe = guide.timesteps, pipe

    def __call__(self, batch: int) -> None:
        pictures = self.pipe._pilotfish_pictures
        if batch != pictures:
            raise GuideError(
                f"{type(self.pipe).__name__} runs the denoiser on a batch of {batch} for "
                f"{pictures} pictures; turn off what makes passes beside guidance, such as PAG"
            )
        if self.known is None:
            return
        known, scheduler, self.known = self.known, self.pipe.scheduler, None
        asked = tuple(int(t) for t in scheduler.timesteps)
        # Euler's steps are DDIM's; solvers that look back on earlier steps would do twice what
        # the guide has learnt to do
        name = type(scheduler).__name__
        if asked == known and name.startswith(("DDIM", "Euler")):
            return
        warnings.warn(
            f"this guide was distilled for {len(known)} DDIM steps at the timesteps "
            f"{', '.join(str(t) for t in known)}, but {name} takes {len(asked)} at "
            f"{', '.join(str(t) for t in asked)}; use num_inference_steps={len(known)} and a "
            'DDIMScheduler with timestep_spacing="trailing"', stacklevel=2,
        )  # fmt: skip


class Undoubled(MultiPipelineCallbacks):
    """A callback at the end of a step, of a call in which nothing is doubled.

    Callbacks that end guidance on the way keep of each condition what belongs to the second
    half of a doubled batch, or its last row. Here there is that half only, and it stays whole.
    Others give a condition for both halves; the first is the negative prompt's. Either may have
    changed the denoiser.
    """

    def __init__(self, call: BoundArguments, guided: GuidedPass) -> None:
        super().__init__([call.arguments["callback_on_step_end"]])
        self.guided = guided
        self.asked = call.arguments.get("callback_on_step_end_tensor_inputs", ["latents"])

    @property
    def tensor_inputs(self) -> list[str]:
        return getattr(self.callbacks[0], "tensor_inputs", self.asked)

    def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> Any:
        before = dict(given)
        after = super().__call__(pipe, step, timestep, given)
        sit(self.guided.guide, pipe)
        self.guided.meddled(pipe._pilotfish_hooks)
        doubled = {
            name: value.chunk(2)
            for name, value in after.items()
            if 0 < 2 * _rows(before.get(name), pipe._pilotfish_pictures) == _rows(value)
        }
        if pipe._pilotfish_negative is not None and doubled.keys() & {TEXT, POOLED}:
            negatives = pipe._pilotfish_negative
            pipe._pilotfish_push_from(
                TextConditions(
                    doubled.get(TEXT, (negatives.hidden_states,))[0],
                    doubled.get(POOLED, (negatives.pooled,))[0],
                )
            )
        shorter = {
            k: before[k]
            for k, v in after.items()
            if isinstance(v, torch.Tensor) and _rows(v) < _rows(before.get(k))
        }
        return after | shorter | {name: second for name, (_, second) in doubled.items()}


def _rows(value: Any, unknown: int = 0) -> int:
    """Of a tensor; of anything else that is not known."""
    return len(value) if isinstance(value, torch.Tensor) and value.ndim else unknown
