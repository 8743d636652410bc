"""The rows of a model: scores of each method, and the share of CFG's gain that it keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from pilotfish.evaluation.images import Progress, named_progress
from pilotfish.evaluation.metrics import gain_kept, gain_kept_interval
from pilotfish.evaluation.protocols.folders import ImageFolder
from pilotfish.evaluation.protocols.methods import CFG, NONE
from pilotfish.evaluation.protocols.results import ComplianceRow, Gain, ProtocolRow
from pilotfish.evaluation.protocols.scores import Scorers
from pilotfish.evaluation.results import Interval, PartialResults

PER_IMAGE: tuple[Literal["clip_score", "pickscore"], ...] = ("clip_score", "pickscore")
UNKNOWN = Interval(math.nan, math.nan)


def negative_name(method: str) -> str:
    """The name of a method with negative prompts."""
    return f"{method}-negative"


def share_kept(
    none: torch.Tensor, cfg: torch.Tensor, own: torch.Tensor, prompt: torch.Tensor
) -> tuple[float, Interval]:
    """The share of CFG's gain in the mean score that a method keeps, and its 95 % interval over
    prompts. Not a number where CFG does not raise the score.

    Args:
        none: (N,) score of each image without guidance.
        cfg: (N,) with CFG, the same prompts and seeds.
        own: (N,) with the method.
        prompt: (N,) index of each image's prompt.
    """
    means = [float(x.mean()) for x in (none, cfg, own)]
    if not means[1] > means[0]:
        return math.nan, UNKNOWN
    scores = (x.float() for x in (none, cfg, own))
    return gain_kept(*means), gain_kept_interval(*scores, prompt=prompt)


class Shares:
    """The rows of each model.

    Args:
        parts: where scores are kept.
        prompt: (N,) index of each image's prompt.
        titles: of the methods, by name.
    """

    def __init__(
        self, scorers: Scorers, parts: PartialResults, prompt: torch.Tensor,
        titles: Mapping[str, str], progress: Progress,
    ) -> None:  # fmt: skip
        self.scorers, self.parts, self.prompt = scorers, parts, prompt
        self.titles, self.progress = titles, progress

    def gains(self, model: str, images: Mapping[str, ImageFolder]) -> dict[str, ProtocolRow]:
        """Every method of a protocol without negative prompts."""
        scores: dict[str, dict[str, torch.Tensor]] = {}
        for metric in PER_IMAGE:
            if getattr(self.scorers, metric) is not None:
                scores[metric] = {
                    method: self._cosines(model, method, metric, found, _prompts(found))
                    for method, found in images.items()
                }
        rows = {}
        for method, found in images.items():
            report = named_progress(self.progress, f"{model}: {method}")
            rows[method] = ProtocolRow(
                self.titles[method], found.passes,
                {metric: self._gain(by_method, method) for metric, by_method in scores.items()},
                self.scorers.distance(found, self.parts, report),
            )  # fmt: skip
        return rows

    def compliance(self, model: str, images: Mapping[str, ImageFolder]) -> dict[str, ComplianceRow]:
        """Every method with and without the negative prompts: its images must be there under its
        name and under that of :func:`negative_name`."""
        methods = [name for name in images if negative_name(name) in images]
        similar = {
            name: self._cosines(
                model, name, "clip_score", found, [case.negative_prompt for case in found.cases]
            )
            for name, found in images.items()
        }
        less = {name: similar[name] - similar[negative_name(name)] for name in methods}
        nothing = torch.zeros(len(self.prompt))
        rows = {}
        for name in methods:
            kept, interval = math.nan, UNKNOWN
            if name != CFG.name:
                kept, interval = share_kept(nothing, less[CFG.name], less[name], self.prompt)
            with_negative = images[negative_name(name)]
            prompt = self._cosines(
                model, negative_name(name), "clip_score", with_negative, _prompts(with_negative)
            )
            rows[name] = ComplianceRow(
                self.titles[name], with_negative.passes, float(similar[name].mean()),
                float(similar[negative_name(name)].mean()), float(less[name].mean()), kept,
                interval, float(prompt.mean()),
            )  # fmt: skip
        return rows

    def _gain(self, scores: Mapping[str, torch.Tensor], method: str) -> Gain:
        own, kept, interval = scores[method], math.nan, UNKNOWN
        if method not in (NONE.name, CFG.name):
            kept, interval = share_kept(scores[NONE.name], scores[CFG.name], own, self.prompt)
        return Gain(float(own.mean()), kept, interval)

    def _cosines(
        self, model: str, method: str, metric: Literal["clip_score", "pickscore"],
        images: ImageFolder, texts: Sequence[str],
    ) -> torch.Tensor:  # fmt: skip
        report = named_progress(self.progress, f"{model}: {method}, {metric}")
        return self.scorers.cosines(metric, images, texts, self.parts, report)


def _prompts(images: ImageFolder) -> list[str]:
    return [case.prompt for case in images.cases]
