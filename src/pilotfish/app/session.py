"""What the app draws: four images of one prompt in each guidance mode, with the seconds of each.

The images of a request are those of :func:`pilotfish.pipelines.sampling.sample`. Requests are drawn
one at a time: the page's queue sees to that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

from PIL.Image import Image
from pydantic import ConfigDict, Field, StringConstraints, ValidationError
from pydantic.dataclasses import dataclass as validated

from pilotfish.guidance import GuidanceMode
from pilotfish.guides import Guide
from pilotfish.interface import GuideError
from pilotfish.pipelines import Reference, Refreshed
from pilotfish.pipelines.attach import check
from pilotfish.pipelines.loading import use_deterministic_scheduler
from pilotfish.pipelines.sampling import Attachable, middle_frame, sample, to_pil
from pilotfish.refresh import places

IMAGES = 4
"""Images of each mode, sampled as one batch. At batch 1 a small model hardly gains by one pass."""
REFRESHES = 8
"""At most so many steps of the guided images run both passes."""
WARM_UP = 4
"""Steps; not every scheduler can take fewer."""
MODES = {
    GuidanceMode.NONE: "No guidance", GuidanceMode.CFG: "CFG", GuidanceMode.GUIDED: "Guided"
}  # fmt: skip

Text = Annotated[str, StringConstraints(strip_whitespace=True, max_length=400)]


class RequestError(ValueError):
    """A request that cannot be drawn; the message says what can."""


@validated(frozen=True, config=ConfigDict(strict=True))
class Request:
    """One prompt on one model. Image i of each mode starts from the noise of ``seed + i``. So many
    steps as ``refresh`` says run both passes with the guide."""

    model: str
    guide: str
    prompt: Text = ""
    negative_prompt: Text = ""
    guidance_scale: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    num_inference_steps: Annotated[int, Field(ge=1, le=100)] = 25
    seed: Annotated[int, Field(ge=0, lt=2**32 - IMAGES)] = 0
    refresh: Annotated[int, Field(ge=0, le=REFRESHES)] = 0

    @classmethod
    def of(cls, **values: Any) -> Request:
        """The request, once every value has been checked.

        Raises:
            RequestError: naming the first value that is out of range or of another type.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name, what = f"{first['loc'][0]}".replace("_", " "), first["msg"]
            given = f"{first['input']!r:.60}"
            raise RequestError(f"{name}: {what[0].lower()}{what[1:]}, not {given}") from error


@dataclass(frozen=True)
class Batch:
    """The images of one mode, and the seconds from the prompt to all of them."""

    images: list[Image]
    seconds: float


class Session:
    """Models and guides that stay loaded.

    Args:
        models: name -> pipeline.
        guides: name -> guide.

    Raises:
        ValueError: no model or no guide; or a model that none of the guides fits.
    """

    def __init__(self, models: Mapping[str, Any], guides: Mapping[str, Guide]) -> None:
        if not models or not guides:
            raise ValueError("the app needs at least one model and one guide")
        self.models, self.guides = dict(models), dict(guides)
        for name, pipe in self.models.items():
            refusals = [r for g in self.guides.values() if (r := _refusal(g, pipe))]
            if len(refusals) == len(self.guides):
                raise ValueError(f"no guide fits the model {name}: {refusals[0]}")
            # the first call is slow, and its seconds would be shown
            options: dict[str, Any] = {"guidance_scale": 2.0, "num_inference_steps": WARM_UP}
            list(sample(pipe, [""] * IMAGES, seeds=range(IMAGES), **options))

    def fitting(self, model: str) -> list[str]:
        """The guides that fit a model."""
        return [name for name, g in self.guides.items() if not _refusal(g, self.models[model])]

    def steps(self, guide: str) -> int | None:
        """The sampling steps that a guide was distilled for; None if any will do."""
        times = self.guides[guide].times
        return None if times is None else len(times)

    def refresh(self, guide: str, steps: int) -> int:
        """How many of so many steps run both passes, by the ratio of the guide; a guide for few
        steps takes its own number."""
        return len(places(self.guides[guide].refresh_ratio, self.steps(guide) or steps))

    def draw(
        self, request: Request, progress: Callable[[str, int, int], None] | None = None
    ) -> dict[GuidanceMode, Batch]:
        """The images of every mode, from the same noise.

        Args:
            progress: called with the mode, its number and how many there are.

        Raises:
            RequestError: an unknown model or guide, a guide that does not fit the model, a scale
                or number of steps that it was not trained for, a prompt that is too long.
        """
        batches = {}
        with self._checked(request) as (pipe, guide):
            for i, mode in enumerate(MODES):
                if progress:
                    progress(MODES[mode], i, len(MODES))
                batches[mode] = _draw(request, mode, pipe, guide)
        return batches

    @contextmanager
    def _checked(self, request: Request) -> Iterator[tuple[Any, Guide]]:
        """The pipeline and the guide of a request. With a guide for few steps, the pipeline has
        the scheduler for those until the block ends."""
        for what, name, known in (
            ("model", request.model, self.models), ("guide", request.guide, self.guides)
        ):  # fmt: skip
            if name not in known:
                raise RequestError(f"there is no {what} {name!r:.60}; there are {', '.join(known)}")
        pipe, guide = self.models[request.model], self.guides[request.guide]
        if refusal := _refusal(guide, pipe):
            raise RequestError(f"{request.guide} does not fit {request.model}: {refusal}")
        steps, scale = self.steps(request.guide), guide.guidance_scale_range[1]
        if steps is not None and steps != request.num_inference_steps:
            raise RequestError(
                f"{request.guide} was distilled for {steps} steps, not "
                f"{request.num_inference_steps}"
            )
        if request.guidance_scale > scale:
            raise RequestError(
                f"{request.guide} was trained up to a guidance scale of {scale:g}, not "
                f"{request.guidance_scale:g}"
            )
        for what, text in (
            ("prompt", request.prompt), ("negative prompt", request.negative_prompt)
        ):  # fmt: skip
            tokens, most = len(pipe.tokenizer(text).input_ids), pipe.tokenizer.model_max_length
            if tokens > most:
                raise RequestError(
                    f"the {what} has {tokens} tokens, {request.model} reads at most {most}"
                )
        scheduler = pipe.scheduler
        if steps is not None:
            use_deterministic_scheduler(pipe)
        try:
            yield pipe, guide
        finally:
            pipe.scheduler = scheduler


def _draw(request: Request, mode: GuidanceMode, pipe: Any, guide: Guide) -> Batch:
    start = time.perf_counter()
    methods: dict[GuidanceMode, Attachable] = {
        GuidanceMode.CFG: Reference(guide.guidance),
        GuidanceMode.GUIDED: Refreshed(guide, request.refresh),
    }
    samples = sample(
        pipe, [request.prompt] * IMAGES,
        seeds=range(request.seed, request.seed + IMAGES),
        guidance_scale=1.0 if mode == GuidanceMode.NONE else request.guidance_scale,
        num_inference_steps=request.num_inference_steps,
        guide=methods.get(mode),
        negative_prompts=[request.negative_prompt] * IMAGES if request.negative_prompt else None,
    )  # fmt: skip
    frames = [middle_frame(s.image).cpu() for s in samples]  # waits for an accelerator
    seconds = time.perf_counter() - start
    return Batch([image for frame in frames for image in to_pil(pipe, frame)], seconds)


def _refusal(guide: Guide, pipe: Any) -> str:
    """Why a pipeline cannot take a guide; empty if it can."""
    try:
        check(guide, pipe)
    except GuideError as error:
        return str(error)
    return ""
