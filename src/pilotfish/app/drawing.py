"""The studio: what the app draws, for several visitors at once. No page and no web library here.

The picture of a seed is that of :func:`pilotfish.pipelines.sampling.sample`, whoever else is drawing: every
drawing that runs has a pipeline of its own, on weights that all of them share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch

from pilotfish import bundled
from pilotfish.app.request import Limits, Request, RequestError
from pilotfish.evaluation.cost import counted_rows
from pilotfish.evaluation.scores import Progress
from pilotfish.evaluation.ways import TITLES, WAYS
from pilotfish.guides import Guide
from pilotfish.interface import GuideError
from pilotfish.pipelines import check
from pilotfish.pipelines.loading import sibling, take_ddim_steps
from pilotfish.pipelines.sampling import sample


@dataclass(frozen=True)
class Picture:
    """One picture, and what it took.

    Attributes:
        image: (3, H, W) in [-1, 1], on the CPU.
        passes: of the denoiser.
        seconds: wall clock, from the prompt to the picture.
    """

    image: torch.Tensor
    passes: int
    seconds: float


class Seats:
    """Pipelines of one host, as many as drawings ran at the same time."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe  # is never drawn with, so that it can be copied at any time
        self._free: list[Any] = []
        self._lock = Lock()

    @contextmanager
    def taken(self) -> Iterator[Any]:
        """A pipeline that nobody else uses until the block ends."""
        with self._lock:
            pipe = self._free.pop() if self._free else self._made()
        try:
            yield pipe
        finally:
            with self._lock:
                self._free.append(pipe)

    def _made(self) -> Any:
        pipe = sibling(self.pipe)
        scheduler = pipe.scheduler
        take_ddim_steps(pipe)  # not every scheduler can take a single one
        for w in (1.0, 2.0):  # what is slow only once must not count as the first visitor's
            list(sample(pipe, [""], seeds=[0], guidance_scale=w, num_inference_steps=1))
        pipe.scheduler = scheduler
        return pipe


class Studio:
    """Hosts and guides to draw with; any number of threads may call it.

    Args:
        hosts: name -> pipeline. They belong to the studio from then on.
        guides: name -> guide.
        limits: what one visitor may take.

    Raises:
        ValueError: no host, no guide, or a host whose pictures are too large.
    """

    def __init__(
        self, hosts: Mapping[str, Any], guides: Mapping[str, Guide], limits: Limits | None = None
    ) -> None:
        if not hosts or not guides:
            raise ValueError("the app needs at least one host and one guide")
        self.guides, self.limits = dict(guides), limits or Limits()
        for name, pipe in hosts.items():
            side = pipe.unet.config.sample_size * pipe.vae_scale_factor
            if side > self.limits.side:
                raise ValueError(
                    f"{name} draws pictures of {side} pixels; the app takes hosts up to "
                    f"{self.limits.side}"
                )
        self.seats = {name: Seats(pipe) for name, pipe in hosts.items()}

    @classmethod
    def embedded(cls) -> Studio:
        """The embedded base, its fine-tunes and guides."""
        return cls(
            {name: bundled.load_model(name) for name in bundled.MODELS},
            {name: bundled.load_guide(name) for name in bundled.guide_names()},
        )

    @property
    def hosts(self) -> list[str]:
        """Their names."""
        return list(self.seats)

    @property
    def widest(self) -> float:
        """The largest w that any guide was trained on."""
        return max(guide.guidance_scale_range[1] for guide in self.guides.values())

    def scale_range(self, guide: str) -> tuple[float, float]:
        """The (low, high) of w that may be asked for with a guide: 1, which is no guidance, up to
        the largest that it was trained on.

        Raises:
            RequestError: no such guide.
        """
        return 1.0, self._guide(guide).guidance_scale_range[1]

    def request(self, *, host: Any, guide: Any, **values: Any) -> Request:
        """A request whose every value is in its bounds.

        Raises:
            RequestError: one is not.
        """
        if not isinstance(host, str) or host not in self.seats:
            raise RequestError(f"there is no host {_name(host)}; there are {_list(self.seats)}")
        scales = self.scale_range(guide)
        return Request.check(self.limits, scales, host=host, guide=guide, **values)

    def ways(self, request: Request, progress: Progress | None = None) -> dict[str, Picture]:
        """The request drawn without guidance, with CFG and guided, from the same noise.

        Raises:
            RequestError: a text too long for the host, or a guide that does not fit it.
        """
        w = request.guidance_scale
        with self._ready(request) as draw:
            calls = {"none": (1.0, False), "cfg": (w, False), "guided": (w, True)}
            drawn = {}
            for i, way in enumerate(WAYS):
                if progress:
                    progress(TITLES[way], i, len(WAYS))
                drawn[way] = draw(*calls[way])
        return drawn

    def strip(
        self, request: Request, scales: Sequence[float], progress: Progress | None = None
    ) -> dict[str, list[Picture]]:
        """The request at several w in place of its own, with CFG and guided.

        Raises:
            RequestError: as :meth:`ways`.
        """
        rows: dict[str, list[Picture]] = {"cfg": [], "guided": []}
        with self._ready(request) as draw:
            for i, w in enumerate(scales):
                for j, way in enumerate(rows):
                    if progress:
                        progress(f"{TITLES[way]}, w = {w:g}", 2 * i + j, 2 * len(scales))
                    rows[way].append(draw(w, way == "guided"))
        return rows

    def guided(self, requests: Sequence[Request]) -> list[torch.Tensor]:
        """(3, H, W) guided pictures of requests that differ in prompt and seed only, at once."""
        one = requests[0]
        with self._seat(one) as (pipe, guide):
            made = sample(
                pipe, [r.prompt for r in requests], seeds=[r.seed for r in requests],
                guidance_scale=one.guidance_scale, guide=guide,
                num_inference_steps=one.num_inference_steps,
            )  # fmt: skip
            return [m.image.cpu() for m in made]

    @contextmanager
    def _ready(self, request: Request) -> Iterator[Callable[[float, bool], Picture]]:
        """A function (w, guided) -> picture, once nothing stands against the request."""
        negative = request.negative_prompt
        with self._seat(request) as (pipe, guide):
            for what, text in (("the prompt", request.prompt), ("the negative prompt", negative)):
                # but for its beginning and its end
                tokens = len(pipe.tokenizer(text, verbose=False).input_ids) - 2
                most = pipe.tokenizer.model_max_length - 2
                if tokens > most:
                    raise RequestError(
                        f"{what} has {tokens} tokens; {request.host} reads at most {most}"
                    )

            def draw(w: float, guided: bool) -> Picture:
                start = time.perf_counter()
                with counted_rows(pipe.unet) as rows:
                    (made,) = sample(
                        pipe, [request.prompt], seeds=[request.seed], guidance_scale=w,
                        num_inference_steps=request.num_inference_steps,
                        guide=guide if guided else None,
                        negative_prompts=[negative] if negative else None,
                    )  # fmt: skip
                image = made.image.cpu()  # waits for an accelerator
                return Picture(image, sum(rows), time.perf_counter() - start)

            yield draw

    @contextmanager
    def _seat(self, request: Request) -> Iterator[tuple[Any, Guide]]:
        """A pipeline of the host for the length of a block, and the guide, if they fit. With a
        guide for few steps it takes those, in all ways alike, whatever scheduler it came with."""
        guide, steps = self._guide(request.guide), request.num_inference_steps
        if guide.timesteps is not None and steps != len(guide.timesteps):
            raise RequestError(
                f"{request.guide} was distilled for {len(guide.timesteps)} steps, not {steps}"
            )
        with self.seats[request.host].taken() as pipe:
            try:
                check(guide, pipe)
            except GuideError as error:
                raise RequestError(
                    f"{request.guide} does not fit {request.host}: {error}"
                ) from error
            scheduler = pipe.scheduler
            if guide.timesteps is not None:
                take_ddim_steps(pipe)
            try:
                yield pipe, guide
            finally:
                pipe.scheduler = scheduler

    def _guide(self, name: Any) -> Guide:
        if not isinstance(name, str) or name not in self.guides:
            raise RequestError(f"there is no guide {_name(name)}; there are {_list(self.guides)}")
        return self.guides[name]


def _name(value: Any) -> str:
    """What was asked for, not at any length."""
    return f"{value!r:.60}"


def _list(names: Mapping[str, Any]) -> str:
    return ", ".join(names)
