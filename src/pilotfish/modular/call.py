"""One call of a modular pipeline, as its guider sees it.

A guider is given the step and its timestep, the conditions of both passes and the denoiser. It sees
neither the pipeline nor its scheduler, and is not told when a call begins or ends.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from pilotfish.backbones import Backbone, GuidedPass, is_compiled
from pilotfish.interface import GuideError, GuideProtocol, TextConditions
from pilotfish.refresh import RefreshSteps, places

EMBEDS = ("encoder_hidden_states", "prompt_embeds", "cap_feats")
POOLED = ("text_embeds", "pooled_projections")
MASKS = ("encoder_hidden_states_mask", "encoder_attention_mask")
"""Names under which the blocks of diffusers give a guider the text, for all families."""
IMAGES, SIZES = "image_embeds", "time_ids"
"""Those of an IP-Adapter's embeddings, and of SDXL's sizes."""

Conditions = Mapping[str, tuple[Any, Any]]
"""The conditions of a step by name: that of the prompt, and that of the negative prompt."""


class Call:
    """What lasts as long as a call does.

    Args:
        guide: on the device and in the precision of the call.
        schedule: see :func:`schedule_of`.
        refresh_at: denoiser calls with both passes, counted from the first one of this object.

    Attributes:
        scale: w at the running step.
        place: of the running step in the schedule; None where that is not known.
        guided: the guided pass of the call.
    """

    def __init__(
        self, guide: GuideProtocol, schedule: torch.Tensor | None, refresh_at: tuple[int, ...]
    ) -> None:
        self.guide, self.schedule, self.refresh_at = guide, schedule, refresh_at
        self.scale = 1.0
        self.place: int | None = None
        self.end()

    def end(self) -> None:
        """Keep nothing of what was given or computed."""
        self._given: tuple[Any, ...] = ()
        self._negative = TextConditions(torch.empty(0))
        self.guided = GuidedPass(
            self.guide,
            lambda: self.scale,
            lambda: self._negative,
            timesteps=lambda: self.schedule,
            step=lambda: self.place,
            refresh_at=lambda steps: self.refresh_at,
        )

    def take(self, conditions: Conditions, backbone: Backbone) -> None:
        """Take the negative prompts of a step. Blocks give the same tensors at every step, and what
        was made of them is kept as long as they do.

        Raises:
            GuideError: there are none.
        """
        names = (name for name in conditions if name in (*EMBEDS, *POOLED, *MASKS, IMAGES, SIZES))
        given = tuple(conditions[name][1] for name in names)  # SD3's latents change at every step
        same = len(given) == len(self._given)
        if same and all(a is b for a, b in zip(given, self._given, strict=True)):
            return
        negative = negative_prompts(conditions, backbone)
        # a graph is compiled for one negative prompt or for as many as images, not for both
        alike = negative if is_compiled(backbone.denoiser) else negative.one_if_equal()
        self._given, self._negative = given, alike
        _, images = conditions.get(IMAGES, (None, None))
        if images is not None:  # of an IP-Adapter each
            self.guided.negative_images = [images] if isinstance(images, torch.Tensor) else images
        prompt, negative_sizes = conditions.get(SIZES, (None, None))
        if negative_sizes is not None and not torch.equal(prompt, negative_sizes):
            warnings.warn(
                "sizes, crops or scores of the negative prompt act on the second pass, and a guide "
                "makes none", stacklevel=2,
            )  # fmt: skip


def negative_prompts(conditions: Conditions, backbone: Backbone) -> TextConditions:
    """The N negative prompts of a step.

    Raises:
        GuideError: the blocks have encoded none.
    """

    def find(names: tuple[str, ...]) -> tuple[Any, Any]:
        return next((conditions[name] for name in names if name in conditions), (None, None))

    prompt, embeds = find(EMBEDS)
    if embeds is None:
        raise GuideError(
            "the pipeline has encoded no negative prompt for the guide; run its text encoder with "
            "this guider enabled, or give negative_prompt_embeds"
        )
    if isinstance(embeds, torch.Tensor):
        return TextConditions(embeds, find(POOLED)[1], find(MASKS)[1])
    found = backbone.split_encoded((prompt, embeds))[1]  # a list, one tensor for each prompt
    assert found is not None
    return found


def schedule_of(timestep: Any) -> torch.Tensor | None:
    """(T,) the schedule that a timestep was taken from: loops iterate over it, and so each timestep
    is a view into its memory. None where it is not."""
    if not isinstance(timestep, torch.Tensor):
        return None
    storage = timestep.untyped_storage()
    steps = storage.nbytes() // timestep.element_size()
    if steps < 2:
        return None
    whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device)
    return whole.set_(storage, 0, (steps,), (1,))


def same_schedule(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether two schedules are the same memory. As both are held, it was not used again."""
    known = one is not None and other is not None
    return known and one.data_ptr() == other.data_ptr()  # type: ignore[union-attr]


def refresh_plan(
    refresh: RefreshSteps, steps: int, guided: tuple[int, int], *, few_steps: bool = False
) -> tuple[int, ...]:
    """The steps of a call that run both passes, counted from 0. A number or a ratio counts the
    guided steps and is spread over them.

    Args:
        steps: of the call.
        guided: the first guided step, and that after the last.
        few_steps: whether the guide was distilled to few steps.
    """
    first, end = guided
    if isinstance(refresh, int | float):
        found = places(refresh, end - first, few_steps=few_steps)
        return tuple(first + place for place in found)
    return places(refresh, steps, few_steps=few_steps)


def warn_of_training(
    guide: GuideProtocol, backbone: Backbone, scale: float, offset: float,
    schedule: torch.Tensor | None,
) -> None:  # fmt: skip
    """Warn of a scale or of steps that are not those of the guide's training.

    Args:
        scale: w.
        offset: what was added to ``guidance_scale`` to give it.
    """
    low, high = guide.guidance_scale_range
    if not low <= scale <= high:
        warnings.warn(
            f"guidance_scale {scale - offset:g} lies outside [{low - offset:g}, "
            f"{high - offset:g}], where this guide was trained", stacklevel=2,
        )  # fmt: skip
    if guide.times is None or schedule is None:
        return
    taken, known = backbone.schedule_time(schedule).tolist(), list(guide.times)
    close = (abs(a - b) < 1e-4 for a, b in zip(taken, known, strict=False))
    if len(taken) != len(known) or not all(close):
        warnings.warn(
            f"this guide was distilled for {len(known)} steps at the times "
            f"{', '.join(f'{t:.4g}' for t in known)}, and the scheduler takes {len(taken)} at "
            f"{', '.join(f'{t:.4g}' for t in taken)}", stacklevel=2,
        )  # fmt: skip
