"""How good pictures are against the number of sampling steps, way by way."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pilotfish.evaluation.cost import guide_size, take_turns, timed_call
from pilotfish.evaluation.features import Judge
from pilotfish.evaluation.gallery import Gallery
from pilotfish.evaluation.hosts import Host
from pilotfish.evaluation.machine import machine, versions
from pilotfish.evaluation.parts import Unfinished, fingerprint, modules
from pilotfish.evaluation.result import GuideSize, Run, Scores
from pilotfish.evaluation.saved import Saved
from pilotfish.evaluation.scores import Progress
from pilotfish.evaluation.spread import on_main
from pilotfish.guides import Guide
from pilotfish.pipelines.loading import take_ddim_steps
from pilotfish.pipelines.sampling import Attachable
from pilotfish.teacher import checksum

STEPS = (4, 8, 16, 32, 50)
BATCH = 8
"""Pictures at once where the wall clock is compared."""


@dataclass(frozen=True)
class StepScores:
    """One way with one number of steps: the judge's scores, and passes for one picture."""

    passes: float
    scores: Scores


@dataclass
class StepParts(Unfinished):
    """What is measured so far, and the wall clock of a way with a number of steps."""

    cells: dict[str, StepScores] = field(default_factory=dict)


@dataclass(frozen=True)
class StepsResult(Saved):
    """Scores against steps.

    Attributes:
        hosts: by host, way and number of steps.
        wall_clock: by way and number of steps, of a call on the first host; that of CFG with
            the most steps is 1.
        guides: the size of each guide, by way and number of steps where each has its own.
        run: the number of steps in it is the largest.
    """

    hosts: dict[str, dict[str, dict[str, StepScores]]]
    wall_clock: dict[str, dict[str, float]]
    guides: dict[str, GuideSize]
    run: Run


@dataclass(frozen=True)
class Way:
    """One way to sample: ``none``, ``cfg``, a method, or guides that each know their steps."""

    guidance_scale: float
    methods: Mapping[int | None, Attachable | None]

    @classmethod
    def of(cls, guidance_scale: float, methods: Sequence[Attachable]) -> Way:
        """A guide that was distilled to few steps serves those, any other method all.

        Raises:
            ValueError: two of them serve the same number of steps.
        """
        found: dict[int | None, Attachable | None] = {}
        for method in methods:
            known = method.timesteps if isinstance(method, Guide) else None
            steps = None if known is None else len(known)
            if steps in found:
                raise ValueError(f"two guides of one way for {steps or 'any number of'} steps")
            found[steps] = method
        return cls(guidance_scale, found)

    def steps(self, wanted: Sequence[int]) -> list[int]:
        """Those of the numbers of steps that this way can take."""
        return [n for n in wanted if n in self.methods or None in self.methods]

    def method(self, steps: int) -> Attachable | None:
        """What samples with so many steps."""
        return self.methods[steps] if steps in self.methods else self.methods[None]


def score_steps(
    hosts: Mapping[str, Host],
    methods: Mapping[str, Sequence[Attachable]],
    *,
    names: Sequence[str],
    command: str,
    steps: Sequence[int] = STEPS,
    samples: int = 300,
    seed: int = 0,
    guidance_scale: float = 4.0,
    batch_size: int = 32,
    rounds: int = 3,
    judge: Judge | None = None,
    unfinished: str | Path | None = None,
    progress: Progress | None = None,
) -> StepsResult:
    """Draw every way with every number of steps on every host, from the same noise. All of them
    take DDIM's steps, whatever scheduler a host comes with.

    Args:
        hosts: by name, the base first.
        methods: by the name of the way; the ways ``none`` and ``cfg`` are always there. Several
            guides make one way if each was distilled to another number of steps.
        names: what is drawn, and among which the judge must find the right one.
        command: the command line that repeats the run.
        rounds: of the wall clock.
        unfinished: file that keeps each part as soon as it is measured; the same call goes on
            from it. To be deleted when the result is safe.
        progress: called after every batch.

    Raises:
        ValueError: no host, no number of steps, no round, a w of at most 1; and as
            :class:`Gallery`.
        GuideError: a guide does not fit a host.
    """
    if not hosts or not steps or min(steps) < 1:
        raise ValueError("at least one host and one number of steps are needed")
    if rounds < 1:
        raise ValueError(f"at least one round is needed, not {rounds}")
    if guidance_scale <= 1:
        raise ValueError(f"CFG is no guidance at w = {guidance_scale:g}; take more")
    judge, steps = judge or Judge.embedded(), sorted(set(steps))
    ways = {"none": Way(1.0, {None: None}), "cfg": Way(guidance_scale, {None: None})}
    ways |= {name: Way.of(guidance_scale, given) for name, given in methods.items()}
    parts, found = StepParts.found(unfinished), {}
    # before any host has turned a guide to its own precision
    marks = {id(m): _mark(m) for way in ways.values() for m in way.methods.values()}
    for host, given in hosts.items():
        pipe = given.load()
        take_ddim_steps(pipe)
        gallery = Gallery(
            pipe, judge, prompts=names, names=names,
            pictures_folder=given.pictures, samples=samples, seed=seed, batch_size=batch_size,
        )  # fmt: skip
        networks = {**modules(pipe), "judge": judge.model}
        settings = {"names": names, "samples": samples, "seed": seed, "pictures": given.pictures,
                    "on": (machine(), versions())}  # fmt: skip
        found[host] = {
            name: {
                str(n): _cell(
                    parts, unfinished, gallery, networks, settings, way, n,
                    progress, f"{host}: {name}, {n} steps", marks[id(way.method(n))],
                )
                for n in way.steps(steps)
            }
            for name, way in ways.items()
        }  # fmt: skip
    base = next(iter(hosts.values())).load()
    take_ddim_steps(base)
    guides = {
        f"{name}-{n}" if n else name: guide_size(method, base, name)
        for name, way in ways.items()
        for n, method in way.methods.items()
        if isinstance(method, Guide)
    }
    run = Run(command, seed, samples, guidance_scale, steps[-1], machine(), versions())
    wall_clock = on_main(partial(_wall_clock, base, ways, steps, rounds, names[0]))
    return StepsResult(found, wall_clock, guides, run)


def _cell(
    parts: StepParts, file: str | Path | None, gallery: Gallery, networks: dict[str, nn.Module],
    settings: dict[str, Any], way: Way, steps: int, progress: Progress | None, what: str, mark: str,
) -> StepScores:  # fmt: skip
    """One way with one number of steps, measured unless it is among the parts."""
    method = way.method(steps)
    key = what
    if file is not None:
        key = fingerprint(
            networks, settings | {"w": way.guidance_scale, "steps": steps, "method": mark}
        )

    def measure() -> StepScores:
        judged = gallery.draw(way.guidance_scale, steps, method, progress, what)
        return StepScores(judged.passes, judged.scores)

    return parts.measured(parts.cells, key, measure, file)


def _mark(method: Attachable | None) -> str:
    """What tells a method from others: its kind, its settings, its weights."""
    if isinstance(method, Guide):
        return f"{type(method).__name__} {sorted(method.config.items())} {checksum(method)}"
    return f"{type(method).__name__} {sorted(vars(method).items()) if method else None}"


@torch.no_grad()
def _wall_clock(
    pipe: Any, ways: Mapping[str, Way], steps: Sequence[int], rounds: int, prompt: str
) -> dict[str, dict[str, float]]:
    """All ways take turns, so that a busy machine strikes all alike."""
    calls = {
        (name, n): partial(timed_call, pipe, way.method(n), way.guidance_scale, n, BATCH, prompt)
        for name, way in ways.items()
        for n in way.steps(steps)
    }
    times = take_turns(calls, rounds)
    longest = ("cfg", steps[-1])
    found: dict[str, dict[str, float]] = {name: {} for name in ways}
    for name, n in calls:
        found[name][str(n)] = statistics.median(r[name, n] / r[longest] for r in times)
    return found
