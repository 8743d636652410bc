"""Callbacks at the end of a step, in a call whose batch is not doubled."""

from __future__ import annotations

from dataclasses import replace
from inspect import BoundArguments
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks

from pilotfish.pipelines.guided import RunningCall, sync

TEXT = ("prompt_embeds",)
POOLED = ("add_text_embeds", "pooled_prompt_embeds")
"""Conditions of which a doubled batch has the negative prompt's in its first half."""


class CallbackAdapter(MultiPipelineCallbacks):
    """A user's callback in a call that is not doubled.

    Callbacks that end guidance on the way keep of each condition the second half of a doubled
    batch, or its last row. Here there is that half only, and it stays whole. Others give a
    condition for both halves; the first is the negative prompt's. Either may have changed the
    denoiser.
    """

    def __init__(self, call: BoundArguments, running: RunningCall) -> None:
        super().__init__([call.arguments["callback_on_step_end"]])
        self.running = running
        self.asked = call.arguments.get("callback_on_step_end_tensor_inputs", ["latents"])

    @property
    def tensor_inputs(self) -> list[str]:
        return getattr(self.callbacks[0], "tensor_inputs", self.asked)

    def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> Any:
        running = self.running
        before = dict(given)
        after = super().__call__(pipe, step, timestep, given)
        running.guided.guide = sync(pipe)
        running.guided.invalidate(pipe._pilotfish_hooks)
        doubled = {
            name: value.chunk(2)
            for name, value in after.items()
            if 0 < 2 * _rows(before.get(name), running.images) == _rows(value)
        }
        if running.negative is not None and doubled.keys() & {*TEXT, *POOLED}:
            halves = {name: first for name, (first, _) in doubled.items()}
            embeds = next((halves[n] for n in TEXT if n in halves), running.negative.embeds)
            pooled = next((halves[n] for n in POOLED if n in halves), running.negative.pooled)
            running.keep(replace(running.negative, embeds=embeds, pooled=pooled))
        shorter = {
            k: before[k]
            for k, v in after.items()
            if isinstance(v, torch.Tensor) and _rows(v) < _rows(before.get(k))
        }
        return after | shorter | {name: second for name, (_, second) in doubled.items()}


def _rows(value: Any, unknown: int = 0) -> int:
    """Of a tensor; of anything else that is not known."""
    return len(value) if isinstance(value, torch.Tensor) and value.ndim else unknown
