"""What is measured: every method at several numbers of second passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from baselines.comparison.config import titles
from baselines.linear_ag import LinearAG, alternating, fit
from baselines.reuse import CompressGuidance, DeltaReuse, denser_early, every_nth
from baselines.training_free import AdaptiveGuidance, GuidanceInterval
from pilotfish.evaluation.images import TITLES
from pilotfish.guides import Guide
from pilotfish.pipelines import Refreshed
from pilotfish.pipelines.sampling import Attachable
from pilotfish.refresh import inside

COUNTS = (0, 1, 2, 3, 4, 5, 8)
"""Second passes of our guides and, but for 0, of delta reuse."""
FEW_COUNTS = (0, 1, 2, 3)
"""Those of guides that were distilled to few steps."""
TRAINED_COUNTS = (0, 3, 5)
"""Those of the trained baselines."""
RULE_COUNTS = (2, 3, 5, 8)
"""Those of the rules that use earlier predictions again."""
PLACED_COUNTS = (2, 3, 5)
"""Second passes of our guides in other places."""
INTERVALS = (3, 5, 8, 12, 15)
"""Steps of the guidance interval."""
INTERVAL_END = 1000
"""Above its timesteps. The paper leaves out the highest noise; on the bundled models images end
nearer to CFG's if the interval begins there."""
THRESHOLDS = (0.7, 0.9, 0.98, 0.99)
"""Cosines of adaptive guidance."""
FEW_STEPS = 8
"""Steps at which delta reuse is measured beside a few-step guide."""

_TITLES = TITLES | {
    "delta-reuse-slope": "delta reuse, half of its slope added",
    "compress-guidance-reuse": "Compress Guidance, reused",
    "linear-ag": LinearAG.title,
    "linear-ag-even": "LinearAG, every n-th step",
}


def title(method: str) -> str:
    """Its name in tables and plots."""
    return _TITLES.get(method) or titles().get(method, method)


@dataclass(frozen=True)
class Candidate:
    """A point of the frontier before it is measured.

    Attributes:
        method: its name.
        steps: of the sampling.
        refresh: steps that run both passes; NaN where the method decides that itself.
        make: what a pipeline samples with; None is the pipeline's own CFG.
        setting: what else tells it from others of the method.
        whole: measured on all images; else on a part of them.
    """

    method: str
    steps: int
    refresh: int | float
    make: Callable[[], Attachable | None] = lambda: None
    setting: str = ""
    whole: bool = True

    @property
    def key(self) -> tuple[str, str, str, int]:
        """That of its entry."""
        return self.method, str(self.refresh), self.setting, self.steps

    def scale(self, guidance_scale: float) -> float:
        """The w of its calls."""
        return 1.0 if self.method == "none" else guidance_scale


def candidates(
    guides: Mapping[str, Guide], trained: Mapping[str, Guide], gram: Callable[[], torch.Tensor],
    steps: int, reference_steps: int,
) -> list[Candidate]:  # fmt: skip
    """Everything that is measured on a model.

    Args:
        guides: ours by name, measured on all images.
        trained: baselines by name, measured on a part of them.
        gram: makes what LinearAG is fitted to (:func:`baselines.linear_ag.gram_matrix`).
        steps: of all but few-step guides.
        reference_steps: of CFG and no guidance, to which few-step guides are compared.
    """
    few = {len(guide.times) for guide in (*guides.values(), *trained.values()) if guide.times}
    found = [
        Candidate(method, n, n if method == "cfg" else 0)
        for n in dict.fromkeys([steps, *([reference_steps] if few else [])])
        for method in ("none", "cfg")
    ]
    for name, guide in guides.items():
        own, counts = (len(guide.times), FEW_COUNTS) if guide.times else (steps, COUNTS)
        found += _guided(name, guide, own, counts, whole=True)
        if not guide.times:
            found += [
                Candidate(
                    name, steps, k, partial(Refreshed, guide, places(k)), setting, whole=False
                )
                for setting, places in _elsewhere(steps).items()
                for k in PLACED_COUNTS
            ]
    for name, guide in trained.items():
        found += _guided(name, guide, len(guide.times or ()) or steps, TRAINED_COUNTS, whole=False)
    found += [Candidate("delta-reuse", steps, k, partial(DeltaReuse, k)) for k in COUNTS[1:]]
    if FEW_STEPS in few:
        found += [
            Candidate("delta-reuse", FEW_STEPS, k, partial(DeltaReuse, k)) for k in FEW_COUNTS[1:]
        ]
    found += _rules(gram, steps)
    return [one for one in found if one.method == "cfg" or not one.refresh >= one.steps]


def _elsewhere(steps: int) -> dict[str, Callable[[int], tuple[int, ...]]]:
    """Other places for the steps of our guides that run both passes."""
    return {
        "evenly": lambda k: inside(k, steps),
        "evenly from the first step": lambda k: every_nth(k, steps),
    }


def _guided(
    name: str, guide: Guide, steps: int, counts: Sequence[int], *, whole: bool
) -> list[Candidate]:
    return [
        Candidate(name, steps, k, partial(Refreshed, guide, k), whole=whole) for k in counts
    ]  # fmt: skip


def _rules(gram: Callable[[], torch.Tensor], steps: int) -> list[Candidate]:
    """The rules without training, on a part of the images."""
    kinds: dict[str, Callable[[int], Attachable]] = {
        "compress-guidance": CompressGuidance,
        "delta-reuse-slope": lambda k: DeltaReuse(k, slope=0.5),
        "compress-guidance-reuse": lambda k: DeltaReuse(k, places=denser_early),
        "linear-ag": lambda k: fit(gram(), alternating(k, steps)),
        "linear-ag-even": lambda k: fit(gram(), every_nth(k, steps)),
    }
    found = [
        Candidate(name, steps, k, partial(make, k), whole=False)
        for name, make in kinds.items()
        for k in (COUNTS[1:] if name == "linear-ag-even" else RULE_COUNTS)
    ]
    for k in INTERVALS:
        low = INTERVAL_END - 1000 * k / steps
        make, setting = partial(GuidanceInterval, low, INTERVAL_END), f"t from {low:g}"
        found.append(Candidate("guidance-interval", steps, k, make, setting, whole=False))
    for threshold in THRESHOLDS:
        adaptive = partial(AdaptiveGuidance, threshold)
        setting = f"threshold {threshold:g}"
        found.append(
            Candidate("adaptive-guidance", steps, math.nan, adaptive, setting, whole=False)
        )
    return found
