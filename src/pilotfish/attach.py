"""A guide on a diffusers pipeline: the user's call stays as it is, the second pass is gone.

``attach`` gives the pipeline object a subclass of its own class, under the same name (so
that saving and ``AutoPipeline`` still know it), whose ``__call__`` opens a
:class:`~pilotfish.denoisers.GuidedPass` around the original one and answers "no" when the
pipeline asks whether it should run classifier-free guidance. ``detach`` gives the class back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from inspect import BoundArguments, signature
from threading import Lock
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks

from pilotfish.contract import GuideError, GuideLike, PromptEmbeds
from pilotfish.denoisers import (
    GuidedPass,
    Hooks,
    Origin,
    fingerprint,
    heed_hooks,
    install,
    is_compiled,
    uncompiled,
)

ASKS = "do_classifier_free_guidance"
"""What a pipeline asks itself, and tells those who prepare its conditions."""
SECOND_PASS = (
    "guidance_rescale",
    "guess_mode",
    "negative_original_size",
    "negative_target_size",
    "negative_crops_coords_top_left",
    "negative_aesthetic_score",
)
"""Arguments of a pipeline's call that act on the second pass only."""
TEXT, POOLED = "prompt_embeds", "add_text_embeds"
"""Conditions of which a doubled batch has the negative prompt's in its first half."""


class Guided:
    """Mixed in before a pipeline's own class while a guide is attached to it."""

    _pilotfish_guide: GuideLike
    _pilotfish_hooks: Hooks
    _pilotfish_drawing: Lock
    _pilotfish_negative: PromptEmbeds | None = None
    _pilotfish_pictures: int = 0
    _pilotfish_open: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        drawing = self._pilotfish_drawing
        if not drawing.acquire(blocking=False):
            raise GuideError(
                "this pipeline is drawing already; for another thread make one on the same weights "
                "(pilotfish.pipelines.sibling) and attach the guide to it as well"
            )
        try:
            return self._pilotfish_draw(_bind(_own_call(self), args, kwargs))
        finally:
            drawing.release()

    def _pilotfish_draw(self, call: BoundArguments) -> Any:
        guide = self._pilotfish_guide
        _sit(guide, self)
        _warn_of_arguments(guide, call, self)
        guided = GuidedPass(
            guide,
            lambda: self.guidance_scale,  # type: ignore[attr-defined]
            self._pilotfish_negatives,
            _Watch(guide, self),
            self._pilotfish_hooks,
        )
        if call.arguments.get("callback_on_step_end"):
            call.arguments["callback_on_step_end"] = _Undoubled(call, guided)
        self._pilotfish_open, self._pilotfish_negative, self._pilotfish_pictures = True, None, 0
        try:
            with guided.open():
                return super().__call__(*call.args, **call.kwargs)  # type: ignore[misc]
        finally:
            self._pilotfish_open, self._pilotfish_negative = False, None

    def __copy__(self) -> Any:
        """A pipeline without the guide, on the same parts: a guide is put on one pipeline."""
        return self._pilotfish_plain(lambda part: part)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The same on parts of its own."""
        return self._pilotfish_plain(partial(deepcopy, memo=memo))

    def _pilotfish_plain(self, part: Callable[[Any], Any]) -> Any:
        """A pipeline of the plain class on each ``part`` of this one."""
        kind: Any = type(self).__bases__[1]
        made = kind.__new__(kind)
        mine = {n: v for n, v in vars(self).items() if not n.startswith("_pilotfish_")}
        vars(made).update({name: part(value) for name, value in mine.items()})
        return made

    @property
    def do_classifier_free_guidance(self) -> bool:
        """No, while a guided call is running: the guide takes the second pass's place."""
        return not self._pilotfish_open and super().do_classifier_free_guidance  # type: ignore[misc,no-any-return]

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """As the pipeline does it, and the negative prompt as well, kept for the guide. Whoever
        encodes further texts while the call runs, such as a callback, is given what is asked."""
        plain = super().encode_prompt  # type: ignore[misc]
        if not self._pilotfish_guides or self._pilotfish_negative is not None:
            return plain(*args, **kwargs)
        call = _bind(plain, args, kwargs, **{ASKS: True})
        encoded = plain(*call.args, **call.kwargs)
        # of SDXL: prompt, negative, and both pooled; copies, for they may be the caller's own
        negatives = PromptEmbeds(*(x.clone() for x in encoded[1:4:2]))
        self._pilotfish_pictures = len(negatives)
        self._pilotfish_push_from(negatives)
        return encoded

    def _pilotfish_push_from(self, negatives: PromptEmbeds) -> None:
        """Keep the negative prompts of the batch for the guide."""
        # a graph is compiled for one negative prompt or for as many as pictures, not for both
        compiled = is_compiled(self.unet)  # type: ignore[attr-defined]
        self._pilotfish_negative = negatives if compiled else negatives.shared()

    def prepare_ip_adapter_image_embeds(self, *args: Any, **kwargs: Any) -> Any:
        """Those of the pictures alone, given or made together with the negative ones, as with
        classifier-free guidance."""
        plain = super().prepare_ip_adapter_image_embeds  # type: ignore[misc]
        if not self._pilotfish_guides:
            return plain(*args, **kwargs)
        call = _bind(plain, args, kwargs, **{ASKS: True})
        return [both.chunk(2)[1] for both in plain(*call.args, **call.kwargs)]

    def _pilotfish_negatives(self) -> PromptEmbeds:
        """The negative prompts of the call that is running.

        Raises:
            GuideError: it began without guidance, and so without them.
        """
        if self._pilotfish_negative is None:
            raise GuideError(
                "this call began at a guidance scale of at most 1 and encoded no negative prompt; "
                "begin it above 1 and lower the scale for the steps that are to go without guidance"
            )
        return self._pilotfish_negative

    @property
    def _pilotfish_guides(self) -> bool:
        """Whether a guided call is running, at a scale that needs guidance."""
        return self._pilotfish_open and self.guidance_scale > 1  # type: ignore[attr-defined,no-any-return]


def check(guide: GuideLike, pipe: Any) -> Any:
    """The denoiser of a pipeline that can take this guide.

    Raises:
        GuideError: the pipeline does not leave guidance to a guide, or the guide was made for
            another denoiser.
    """
    unet = _denoiser(pipe)
    prediction = pipe.scheduler.config.get("prediction_type", "epsilon")  # few know of no other
    guide.check(fingerprint(unet, prediction), Origin.of(unet))
    return unet


def attach(guide: GuideLike, pipe: Any) -> None:
    """Put ``guide`` on ``pipe``.

    Raises:
        GuideError: the pipeline does not leave guidance to a guide, another guide is attached
            already, or the guide was made for another denoiser.
    """
    if isinstance(pipe, Guided):
        raise GuideError("this pipeline has a guide already; detach it first")
    hooks, plain = install(guide, check(guide, pipe)), type(pipe)
    guide.eval()
    pipe.__class__ = type(plain.__name__, (Guided, plain), {"__module__": plain.__module__})
    pipe._pilotfish_guide, pipe._pilotfish_hooks, pipe._pilotfish_drawing = guide, hooks, Lock()


def detach(guide: GuideLike, pipe: Any) -> None:
    """Take ``guide`` off ``pipe``.

    Raises:
        GuideError: it is not attached there.
    """
    if not isinstance(pipe, Guided) or pipe._pilotfish_guide is not guide:
        raise GuideError("this guide is not attached to this pipeline")
    pipe._pilotfish_hooks.remove()
    for name in [n for n in vars(pipe) if n.startswith("_pilotfish_")]:
        delattr(pipe, name)
    pipe.__class__ = type(pipe).__bases__[1]


@contextmanager
def attached(guide: GuideLike, pipe: Any) -> Iterator[Any]:
    """Attach for the length of a block, whatever happens in it."""
    attach(guide, pipe)
    try:
        yield pipe
    finally:
        detach(guide, pipe)


class _Undoubled(MultiPipelineCallbacks):
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
        _sit(self.guided.guide, pipe)
        self.guided.meddled(pipe._pilotfish_hooks)
        doubled = {
            name: value.chunk(2)
            for name, value in after.items()
            if 0 < 2 * _rows(before.get(name), pipe._pilotfish_pictures) == _rows(value)
        }
        if pipe._pilotfish_negative is not None and doubled.keys() & {TEXT, POOLED}:
            negatives = pipe._pilotfish_negative
            pipe._pilotfish_push_from(
                PromptEmbeds(
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


class _Watch:
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


def _denoiser(pipe: Any) -> Any:
    """The UNet of a pipeline that leaves guidance to a guide.

    Raises:
        GuideError: it does not.
    """
    unet = uncompiled(getattr(pipe, "unet", None))
    if not isinstance(unet, UNet2DConditionModel):
        why = "it has no UNet2DConditionModel"
    elif not hasattr(pipe, "encode_prompt"):
        why = "it has no encode_prompt, which makes the negative prompt"
    elif not hasattr(type(pipe), ASKS):
        why = f"it does not ask {ASKS} whether to make a second pass"
    elif "guidance_scale" not in signature(_own_call(pipe)).parameters:
        why = "its call takes no guidance_scale"
    elif unet.config.time_cond_proj_dim is not None:
        why = "its denoiser takes in the guidance scale and needs no second pass"
    elif unet.config.encoder_hid_dim_type not in (None, "ip_image_proj"):
        why = f"its denoiser projects the text once more ({unet.config.encoder_hid_dim_type})"
    else:
        return unet
    raise GuideError(f"{type(pipe).__name__} cannot take a guide: {why}; use it without one")


def _own_call(pipe: Any) -> Callable[..., Any]:
    """The pipeline's call as its own class has it."""
    own: Callable[..., Any] = (
        super(Guided, pipe).__call__ if isinstance(pipe, Guided) else pipe.__call__  # type: ignore[misc]
    )
    return own


def _sit(guide: GuideLike, pipe: Any) -> None:
    """Before a call: the guide beside the denoiser, its hooks on the denoiser as it is now."""
    unet, place = uncompiled(pipe.unet), pipe._execution_device
    if not pipe._pilotfish_hooks.sit_on(unet):
        hooks = install(guide, check(guide, pipe))
        pipe._pilotfish_hooks.remove()
        pipe._pilotfish_hooks = hooks
    if is_compiled(pipe.unet):
        heed_hooks(len(guide.pushes) + len(guide.touches))
    if (guide.device, guide.dtype) != (place, unet.dtype):
        guide.to(place, unet.dtype)


def _bind(method: Callable[..., Any], args: Any, kwargs: Any, **changes: Any) -> BoundArguments:
    """The arguments of a method by their names, some of them changed."""
    call = signature(method).bind(*args, **kwargs)
    call.arguments |= changes
    return call


def _warn_of_arguments(guide: GuideLike, call: BoundArguments, pipe: Any) -> None:
    """What a call asks for that a guide cannot give.

    Raises:
        GuideError: a guidance scale that is no finite number.
    """
    usual = {name: p.default for name, p in call.signature.parameters.items()}
    given = usual | call.arguments
    if "guess_mode" in given:  # some ControlNets ask for it themselves
        nets = getattr(pipe.controlnet, "nets", [pipe.controlnet])
        given["guess_mode"] |= any(n.config.get("global_pool_conditions") for n in nets)
    scale = given["guidance_scale"]
    if not abs(scale) <= torch.finfo(torch.float32).max:  # nor is what is not a number
        raise GuideError(f"guidance_scale must be a finite number in single precision, not {scale}")
    if scale <= 1:
        return
    low, high = guide.guidance_scale_range
    if not low <= scale <= high:
        warnings.warn(
            f"guidance_scale {scale} lies outside [{low}, {high}], where this guide was trained",
            stacklevel=4,
        )
    for name in SECOND_PASS:
        if name in given and given[name] != usual[name]:
            warnings.warn(
                f"{name} acts on the second pass, and a guide makes none",
                stacklevel=4,
            )


def _rows(value: Any, unknown: int = 0) -> int:
    """Of a tensor; of anything else that is not known."""
    return len(value) if isinstance(value, torch.Tensor) and value.ndim else unknown
