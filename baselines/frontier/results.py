"""The result of a frontier: a list of entries for each model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from pilotfish.evaluation.results import GuideSize, Saved

Key = tuple[str, str, str, int]
"""What tells the entries of one model apart."""


@dataclass(frozen=True)
class FrontierEntry:
    """A method at one number of passes, on one model.

    Attributes:
        method: its name; ``none`` and ``cfg`` are among them.
        refresh: steps that run both passes; NaN where the method decides that itself.
        steps: of the sampling.
        passes: of the denoiser for one image, counted.
        top1: share of the images whose prompt the scorer ranks first.
        gain_kept: (method - none) / (cfg - none) in top-1 accuracy. ``none`` and ``cfg`` are those
            with as many steps as the run, of few-step guides those with its reference steps.
        interval: its 95 % interval, over the choice of prompts.
        top5_kept: the same as ``gain_kept`` in top-5 accuracy.
        latent_mse_ratio: MSE(method, cfg) / MSE(none, cfg) of final latents.
        fd: Fréchet distance to real images in the scorer's features; NaN without such images. It
            falls with the number of samples.
        flops_over_none: FLOPs of an image relative to none with as many steps.
        cfg_over_it: wall clock on the base, by batch size: CFG with the steps of the run over the
            method.
        samples: images.
        seed: of the first image; the others follow.
        command: which measured it.
        machine: the processor's model and the number of threads.
        setting: what else tells it from other entries of the method.
    """

    method: str
    refresh: int | float
    steps: int
    passes: float
    top1: float
    gain_kept: float
    interval: tuple[float, float]
    top5_kept: float
    latent_mse_ratio: float
    fd: float
    flops_over_none: float
    cfg_over_it: dict[str, float]
    samples: int
    seed: int
    command: str
    machine: str
    setting: str = ""

    @property
    def key(self) -> Key:
        """See :data:`Key`."""
        return self.method, str(self.refresh), self.setting, self.steps

    @property
    def has_cost(self) -> bool:
        """Whether FLOPs and wall clock are measured."""
        return bool(self.cfg_over_it) and math.isfinite(self.flops_over_none)


@dataclass(frozen=True)
class FrontierRun:
    """What the entries have in common.

    Attributes:
        samples: images for each point of our guides and of delta reuse.
        baseline_samples: images for each point of the others, a part of the same images.
        num_inference_steps: of all but few-step guides.
        reference_steps: of CFG and no guidance, to which few-step guides are compared.
        prompts: checksum of the names.
        dtype: precision of the models.
        guides: sizes of our guides.
        weights: checksums of models and guides.
        cost_command: which measured the cost of all entries in one run; empty: none did.
        cost_machine: of that.
    """

    seed: int
    samples: int
    baseline_samples: int
    guidance_scale: float
    num_inference_steps: int
    reference_steps: int
    prompts: str
    dtype: str
    versions: dict[str, str]
    guides: dict[str, GuideSize] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    cost_command: str = ""
    cost_machine: str = ""

    def settings(self) -> tuple[float | str, ...]:
        """What all entries of a result have in common."""
        return (
            self.seed, self.samples, self.baseline_samples, self.guidance_scale,
            self.num_inference_steps, self.reference_steps, self.prompts, self.dtype,
        )  # fmt: skip


@dataclass(frozen=True)
class FrontierResult(Saved):
    """The entries by model."""

    run: FrontierRun
    models: dict[str, list[FrontierEntry]]

    def find(self, model: str, key: Key) -> FrontierEntry | None:
        """The entry of that key, if it is measured."""
        return next((e for e in self.models.get(model, ()) if e.key == key), None)

    @property
    def commands(self) -> list[str]:
        """Those that measured the entries, without their cost."""
        return list(dict.fromkeys(e.command for every in self.models.values() for e in every))

    @property
    def machines(self) -> list[str]:
        """Likewise."""
        return list(dict.fromkeys(e.machine for every in self.models.values() for e in every))

    def only(self, models: Mapping[str, Sequence[Key]]) -> Self:
        """The result with some of its entries.

        Raises:
            KeyError: one of them is not measured.
        """
        chosen: dict[str, list[FrontierEntry]] = {}
        for model, keys in models.items():
            chosen[model] = []
            for key in keys:
                if (entry := self.find(model, key)) is None:
                    raise KeyError(f"{key[0]} with {key[1]} refreshes is not measured on {model}")
                chosen[model].append(entry)
        return replace(self, models=chosen)

    def put(self, model: str, entry: FrontierEntry) -> None:
        """Add an entry, or replace the one of its key."""
        entries = self.models.setdefault(model, [])
        for i, other in enumerate(entries):
            if other.key == entry.key:
                entries[i] = entry
                return
        entries.append(entry)
