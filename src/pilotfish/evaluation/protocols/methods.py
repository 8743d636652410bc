"""The rows of a protocol: no guidance, CFG, guides at several refreshes, delta reuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers import DPMSolverMultistepScheduler

from pilotfish.evaluation.images import TITLES
from pilotfish.guides import Guide
from pilotfish.noise import prediction_type
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.sampling import Attachable

GUIDANCE_SCALES = {
    "StableDiffusionXLPipeline": 5.0,
    "StableDiffusion3Pipeline": 4.5,
    "StableDiffusionPipeline": 7.5,
}
"""The w of a protocol by pipeline: the default of the pipeline's call; for SD 3.x that on the model
card of SD 3.5 Medium."""


@dataclass(frozen=True)
class Method:
    """A row.

    Attributes:
        name: its folder, such as ``cfg`` or ``guide-refresh-3``.
        title: its name in tables.
        make: what a pipeline samples with; None is the pipeline's own CFG.
        guided: whether it has the w of the protocol; else 1.
        guide: name of the guide; empty: none.
        with_negative: whether the images have the negative prompts.
    """

    name: str
    title: str
    make: Callable[[], Attachable | None] = lambda: None
    guided: bool = True
    guide: str = ""
    with_negative: bool = False

    def refusal(self, pipe: Any) -> str:
        """Why it does not work with a pipeline; empty: it does."""
        try:
            if (method := self.make()) is not None:
                with method.attached(pipe):
                    pass
            return ""
        except ValueError as error:
            return str(error)


NONE = Method("none", TITLES["none"], guided=False)
CFG = Method("cfg", TITLES["cfg"])


def methods(
    guides: Mapping[str, Guide], refresh: Sequence[int], delta_reuse: Sequence[int],
    make_reuse: Callable[[int], Attachable] | None, num_inference_steps: int,
) -> list[Method]:  # fmt: skip
    """The rows of a protocol.

    Args:
        guides: by name.
        refresh: steps of the guides that run both passes; a row for each number.
        delta_reuse: steps of delta reuse that do.
        make_reuse: makes delta reuse; None: there is no such row.
        num_inference_steps: of a call.

    Raises:
        ValueError: a number outside [0, steps), or a guide for few steps.
    """
    for flag, counts in (("refresh", refresh), ("delta_reuse", delta_reuse)):
        low = 1 if flag == "delta_reuse" else 0
        if wrong := [k for k in counts if not low <= k < num_inference_steps]:
            raise ValueError(
                f"--{flag} {wrong[0]}: at least {low} and fewer than {num_inference_steps} steps"
            )
    if few := [name for name, guide in guides.items() if guide.times]:
        raise ValueError(
            f"guide {few[0]} was distilled to {len(guides[few[0]].times or ())} steps of another "
            "scheduler; pilotfish evaluate --steps measures it"
        )
    found = [NONE, CFG]
    for name, guide in guides.items():
        found += [
            Method(f"{name}-refresh-{k}", f"{name}, refresh={k}", partial(Refreshed, guide, k),
                   guide=name)
            for k in dict.fromkeys(refresh)
        ]  # fmt: skip
    if make_reuse is not None:
        found += [
            Method(f"delta-reuse-{k}", f"delta reuse, refresh={k}", partial(make_reuse, k))
            for k in dict.fromkeys(delta_reuse)
        ]
    return found


def use_protocol_scheduler(pipe: Any) -> None:
    """DPM-Solver++(2M) on the noise of the pipeline's scheduler; flow models keep their own."""
    if prediction_type(pipe.scheduler) != "flow":
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, algorithm_type="dpmsolver++", solver_order=2,
            solver_type="midpoint",
        )  # fmt: skip


def scheduler_facts(pipe: Any) -> str:
    """The class of a scheduler and its configuration."""
    config = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
    return f"{type(pipe.scheduler).__name__} {sorted(config.items())!r}"


def default_guidance_scale(pipe: Any) -> float:
    """The w of the protocol for a pipeline.

    Raises:
        ValueError: none is known.
    """
    name = type(pipe).__name__
    if name not in GUIDANCE_SCALES:
        raise ValueError(f"no guidance scale is known for a {name}; give --guidance_scale")
    return GUIDANCE_SCALES[name]
