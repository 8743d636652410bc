"""One call of a guided pipeline: its scale, its negative prompts, its callbacks.

A pipeline of diffusers decides on classifier-free guidance either by a property, or by comparing
the argument ``guidance_scale`` with 1 inside its call. The argument is replaced here, the property
in :mod:`pilotfish.pipelines.attach`. In both cases ``encode_prompt`` still encodes the negative
prompt, which is kept for the guide, and the denoiser runs once a step on a batch of N. Where the
pipeline encodes the negative prompt separately, that is done here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from inspect import BoundArguments, signature
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks

from pilotfish.backbones import Backbone, GuidedPass, current_pass
from pilotfish.interface import GuideError, GuideProtocol, TextConditions
from pilotfish.pipelines.installing import has_compiled, sync
from pilotfish.refresh import places

CFG_FLAG = "do_classifier_free_guidance"
"""The property of a pipeline, and the argument of its methods that prepare conditions."""
SECOND_PASS = (
    "guidance_rescale",
    "guess_mode",
    "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left",
    "negative_aesthetic_score",
    "skip_guidance_layers",
    "cfg_normalization",
    "cfg_trunc_ratio",
    "cfg_truncation",
)
"""Arguments of a pipeline's call that act on the second pass only."""


NEGATIVE_ARGUMENTS = {
    "negative_prompt": "prompt",
    "negative_prompt_embeds": "prompt_embeds",
    "negative_prompt_embeds_mask": "prompt_embeds_mask",
}
"""Arguments of a call that give the negative prompt, and those with which ``encode_prompt`` takes
it where it is encoded separately."""


class RunningCall:
    """What belongs to one call of a guided pipeline, and is gone after it.

    Attributes:
        guided: the guided pass of the call.
        negative: the negative prompts: one for each image, or one that serves all.
        images: how many images the call makes; 0 as long as that is not known.
    """

    def __init__(self, pipe: Any, guide: GuideProtocol, call: BoundArguments) -> None:
        self.pipe, self.backbone = pipe, Backbone.of_pipeline(pipe)
        self.negative: TextConditions | None = None
        self.images = 0
        self._times = guide.times
        self._argument: float | None = None
        if not hasattr(type(pipe).__bases__[1], CFG_FLAG):
            # the pipeline compares this argument with 1 by itself
            name = self.backbone.scale_argument
            default = call.signature.parameters[name].default
            self._argument = float(call.arguments.get(name, default))
            call.arguments[name] = 1.0
        # how often a pipeline repeats its prompts after encoding them
        encoding = signature(type(pipe).encode_prompt).parameters
        later = "num_images_per_prompt" not in encoding
        self._repeats = call.arguments.get("num_images_per_prompt", 1) if later else 1
        names = ("prompt_embeds", "negative_prompt_embeds")
        embeds = [call.arguments.get(name) for name in names]
        # given as lists, a pipeline takes them without a call of encode_prompt
        self._embeds = embeds if all(isinstance(x, list) for x in embeds) else None
        self._negative_arguments: dict[str, Any] = {}
        if self.backbone.separate_negative:
            known = [name for name in NEGATIVE_ARGUMENTS if name in call.signature.parameters]
            self._negative_arguments = {name: call.arguments.pop(name, None) for name in known}
            given = [
                name
                for name in list(NEGATIVE_ARGUMENTS)[:2]
                if self._negative_arguments.get(name) is not None
            ]
            if len(given) > 1:
                raise GuideError(f"give {given[0]} or {given[1]}, not both")
            if not given and self.backbone.default_negative is None and self.needs_guidance:
                self._argument = 1.0  # as the pipeline does, which warns of it
                warnings.warn(
                    f"{type(pipe).__name__} makes no classifier-free guidance without a "
                    "negative_prompt, and the guide none in its place; give one, such as ' '",
                    stacklevel=4,
                )
        self.guided = GuidedPass(
            guide,
            lambda: self.guidance_scale,
            self._negative,
            timesteps=lambda: getattr(pipe.scheduler, "timesteps", None),
            step=lambda: _step(pipe.scheduler),
            # fewer than the rest of the schedule with SDXL's denoising_end
            refresh_at=lambda steps: places(
                pipe._pilotfish_refresh,
                min(steps, getattr(pipe, "num_timesteps", steps)),
                few_steps=guide.times is not None,
            ),
            check_batch=self._check_batch,
            hooks=pipe._pilotfish_hooks,
        )

    @property
    def guidance_scale(self) -> Any:
        """The scale of the call; callbacks may change it between two steps."""
        scale = self.pipe.guidance_scale if self._argument is None else self._argument
        scale = self.backbone.scale_at_step(self.pipe, scale)
        single = isinstance(scale, torch.Tensor) and scale.ndim == 0
        return (float(scale) if single else scale) + self.backbone.scale_offset

    @property
    def needs_guidance(self) -> bool:
        """Whether the scale is above 1."""
        return bool(self.guidance_scale > 1)

    def encode_prompt(self, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Encode as the pipeline does, and keep the negative prompt of the first encoding. Whoever
        encodes further texts while the call runs, such as a callback, gets what is asked for."""
        if not self.needs_guidance or self.negative is not None:
            return plain(*args, **kwargs)
        split = self.backbone.split_encoded
        if self.backbone.separate_negative:
            encoded = plain(*args, **kwargs)
            negative = {
                NEGATIVE_ARGUMENTS[name]: value for name, value in self._negative_arguments.items()
            }
            default = self.backbone.default_negative
            if default is not None and negative.get("prompt") is None:
                texts = kwargs.get("prompt")
                negative["prompt"] = [default] * len(texts) if isinstance(texts, list) else default
            self._keep_encoded(split(encoded)[0], split(plain(*args, **(kwargs | negative)))[0])
            return encoded
        # encode_prompt may have been replaced by one with other names for its arguments
        place = list(signature(type(self.pipe).encode_prompt).parameters).index(CFG_FLAG) - 1
        if place < len(args):
            args = (*args[:place], True, *args[place + 1 :])
        else:
            kwargs = {**kwargs, CFG_FLAG: True}
        encoded = plain(*args, **kwargs)
        self._keep_encoded(*split(encoded))
        return encoded

    def _keep_encoded(self, prompt: TextConditions, negative: TextConditions | None) -> None:
        found = 0 if negative is None else len(negative)
        self.images = len(prompt)
        if negative is None or found not in (1, self.images):
            raise GuideError(
                f"encode_prompt of this {type(self.pipe).__name__} returned "
                f"{found or 'no'} negative prompt{'s' if found > 1 else ''} for {self.images} "
                "images, and the guide needs one, or one for each image"
                + ("" if self._negative_arguments else f"; return them where {CFG_FLAG} is True")
            )
        rows = torch.arange(found, device=negative.device).repeat_interleave(self._repeats)
        self.images *= self._repeats
        self.keep(negative[rows])  # a copy: they may be the caller's own

    def keep(self, negative: TextConditions) -> None:
        """Keep the negative prompts of the batch for the guide."""
        # a graph is compiled for one negative prompt or for as many as images, not for both
        self.negative = negative if has_compiled(self.pipe) else negative.one_if_equal()

    def _negative(self) -> TextConditions:
        if self.negative is None and self._embeds is not None:
            self._keep_encoded(*self.backbone.split_encoded(self._embeds))
        if self.negative is None:
            raise GuideError(
                "this call began at a guidance scale of at most 1 and encoded no negative prompt; "
                "begin it above 1 and lower the scale for the steps without guidance"
            )
        return self.negative

    def _check_batch(self, batch: int) -> None:
        """Refuse a second pass of another kind; warn once a call when a guide distilled to few
        steps runs on others."""
        if batch != self.images:
            raise GuideError(
                f"{type(self.pipe).__name__} runs the denoiser on a batch of {batch} for "
                f"{self.images} images; turn off what makes further passes, such as PAG"
            )
        if self._times is None:
            return
        known, self._times = self._times, None
        scheduler = self.pipe.scheduler
        taken = self.backbone.schedule_time(scheduler.timesteps).tolist()
        # Euler's steps are those of DDIM; multistep solvers would repeat what the guide was
        # distilled to do
        name = type(scheduler).__name__
        same = len(taken) == len(known) and all(
            abs(a - k) < 1e-4 for a, k in zip(taken, known, strict=True)
        )
        if same and name.startswith(("DDIM", "Euler", "FlowMatchEuler")):
            return
        if not self.backbone.takes_times:
            how = "the scheduler of pilotfish.pipelines.loading.use_deterministic_scheduler(pipe)"
        elif name.startswith("FlowMatch"):
            (argument,) = self.backbone.even_grid(1)
            how = f"{argument} that lie on an even grid"
        else:
            how = 'a DDIMScheduler with timestep_spacing="trailing"'
        warnings.warn(
            f"this guide was distilled for {len(known)} steps at the times {_listed(known)}, but "
            f"{name} takes {len(taken)} at {_listed(taken)}; use num_inference_steps={len(known)} "
            f"and {how}", stacklevel=2,
        )  # fmt: skip


def _step(scheduler: Any) -> int | None:
    """The place of the running step in a schedule that has one denoiser call a step; None where
    the scheduler does not count, or not yet."""
    if getattr(scheduler, "order", 1) != 1:
        return None
    step = getattr(scheduler, "step_index", None)
    found: int | None = getattr(scheduler, "begin_index", None) if step is None else step
    return found


def bind(method: Callable[..., Any], args: Any, kwargs: Any, **changes: Any) -> BoundArguments:
    """The arguments of a method by their names, some of them changed."""
    call = signature(method).bind(*args, **kwargs)
    call.arguments |= changes
    return call


def warn_of_arguments(guide: GuideProtocol, call: BoundArguments, pipe: Any) -> None:
    """Warn of what a call asks for that a guide cannot give.

    Raises:
        GuideError: a guidance scale that is no finite number; perturbed-attention guidance.
    """
    usual = {name: p.default for name, p in call.signature.parameters.items()}
    given = usual | call.arguments
    if "guess_mode" in given:  # some ControlNets ask for it themselves
        nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
        given["guess_mode"] |= any(n.config.get("global_pool_conditions") for n in nets)
    backbone = Backbone.of_pipeline(pipe)
    names = (backbone.scale_argument, *backbone.further_scales)
    scales = {name: given[name] for name in names if given.get(name) is not None}
    for name, scale in scales.items():
        if not abs(scale) <= torch.finfo(torch.float32).max:  # nor is what is not a number
            raise GuideError(f"{name} must be a finite number in single precision, not {scale}")
    if scales[backbone.scale_argument] + backbone.scale_offset <= 1:
        return
    if given.get("pag_scale", 0) > 0 and getattr(pipe, "pag_applied_layers", None):
        # found only at the denoiser, diffusers would leave its attention processors perturbed
        raise GuideError(
            f"{type(pipe).__name__} makes a further pass at a pag_scale above 0, and a guide makes "
            "none; call it with pag_scale=0"
        )
    low, high = (bound - backbone.scale_offset for bound in guide.guidance_scale_range)
    for name, scale in scales.items():
        if scale + backbone.scale_offset != 1 and not low <= scale <= high:
            warnings.warn(
                f"{name} {scale} lies outside [{low}, {high}], where this guide was trained",
                stacklevel=4,
            )
    for name in SECOND_PASS:
        if name in given and given[name] != usual[name]:
            warnings.warn(f"{name} acts on the second pass, and a guide makes none", stacklevel=4)


def _listed(times: Any) -> str:
    return ", ".join(f"{time:.4g}" for time in times)


TEXT = ("prompt_embeds",)
POOLED = ("add_text_embeds", "pooled_prompt_embeds")
"""Conditions of which a doubled batch has the negative prompt's in its first half."""
NEGATIVE = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")


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
        with current_pass(None):  # a plain pipeline called by the callback is not guided
            after = super().__call__(pipe, step, timestep, given)
        running.guided.guide = sync(pipe)
        running.guided.invalidate(pipe._pilotfish_hooks)
        prompts = (n for n in (*TEXT, *POOLED, *NEGATIVE) if n in after)
        if any(after[n] is not before.get(n) for n in prompts):
            running.guided.forget_refresh()
        name, negative = NEGATIVE[0], running.negative
        if running.backbone.negative_from_callback and negative is not None:
            given_now = after.get(name)
            if given_now is not None and given_now is not before.get(name):
                running.keep(replace(negative, embeds=given_now))
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
