"""``python -m tests.stress.runs PART``: one part, or all; those that are done are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import diffusers
import torch
import transformers
import tyro
from tqdm import tqdm

from tests.stress.runs.arguments import anything
from tests.stress.runs.attachments import many_attachments
from tests.stress.runs.files import damaged_checkpoint, damaged_guide, short_run
from tests.stress.runs.images import many_images
from tests.stress.runs.kills import many_kills, short_training
from tests.stress.runs.page import write_page
from tests.stress.runs.result import Figures, HoldingUp, Progress
from tests.stress.runs.users import many_users
from pilotfish import bundled

PARTS = ("images", "attach", "kill", "app", "fuzz")


@dataclass(frozen=True)
class Endurance:
    """How the library holds up under abuse. images, attach, kill, app and fuzz each write what
    they found; all does those that are missing; page puts everything into docs/holding_up.md."""

    part: tyro.conf.Positional[Literal["images", "attach", "kill", "app", "fuzz", "all", "page"]]
    output: Path = Path("results/holding_up.json")
    images: int = 1000
    attachments: int = 1000
    kills: int = 20
    users: int = 8
    minutes: float = 5.0
    examples: int = 300
    """Of each kind of argument."""
    flips: int = 200
    """Single bits flipped in each file."""
    seed: int = 0

    def command(self, name: str) -> str:
        """What repeats a part."""
        own = {
            "images": ("images",), "attach": ("attachments",), "kill": ("kills",),
            "app": ("users", "minutes"), "fuzz": ("examples", "flips"),
        }[name]  # fmt: skip
        values = " ".join(f"--{n} {getattr(self, n)}" for n in (*own, "seed"))
        return f"python -m tests.stress.runs {name} {values}"


def _images(how: Endurance, progress: Progress) -> Figures:
    return many_images(
        bundled.load_model(), bundled.load_guide(), bundled.prompts("held_out"),
        images=how.images, warm_up=200, seed=how.seed, progress=progress,
    )  # fmt: skip


def _attach(how: Endurance, progress: Progress) -> Figures:
    def draw(pipe: Any) -> torch.Tensor:
        noise = torch.Generator().manual_seed(how.seed)
        made: torch.Tensor = pipe(
            "owl", num_inference_steps=2, guidance_scale=4.0, generator=noise, output_type="latent"
        ).images
        return made

    return many_attachments(
        bundled.load_model(), bundled.load_guide(), draw, attachments=how.attachments,
        progress=progress,
    )  # fmt: skip


def _kill(how: Endurance, progress: Progress) -> Figures:
    with TemporaryDirectory() as folder:
        config = short_training(Path(folder))
        return many_kills(config, kills=how.kills, seed=how.seed, progress=progress)


def _app(how: Endurance, progress: Progress) -> Figures:
    return many_users(users=how.users, minutes=how.minutes, seed=how.seed, progress=progress)


def _fuzz(how: Endurance, progress: Progress) -> Figures:
    pipe, guide = bundled.load_model(), bundled.load_guide()
    found = anything(pipe, guide, how.examples, progress)
    with TemporaryDirectory() as place:
        folder = Path(place)
        guide.save_pretrained(folder / "guide")
        found["a guide's files"] = damaged_guide(folder / "guide", how.flips, how.seed, progress)
        run, path = short_run(folder)
        found["a checkpoint's files"] = damaged_checkpoint(run, path, how.flips, how.seed, progress)
    return {f"{name}, {o}": n for name, counts in found.items() for o, n in sorted(counts.items())}


RUN: dict[str, Callable[[Endurance, Progress], Figures]] = {
    "images": _images, "attach": _attach, "kill": _kill, "app": _app, "fuzz": _fuzz,
}  # fmt: skip


@contextmanager
def _bars() -> Iterator[Progress]:
    """Bars that keep nothing of what they have shown: rich's would count among what is left."""
    bars: dict[str, tqdm[Any]] = {}

    def report(what: str, done: int, total: int) -> None:
        bar = bars.get(what)
        if bar is None:
            bar = bars[what] = tqdm(desc=what, position=len(bars))
        bar.total = total
        bar.update(done - bar.n)

    try:
        yield report
    finally:
        for bar in bars.values():
            bar.close()


def run(how: Endurance) -> None:
    """One part, or all that are missing."""
    if how.part == "page":
        write_page(Path("docs/holding_up.md"), how.output)
        return
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for name in PARTS if how.part == "all" else (how.part,):
        command = how.command(name)
        if HoldingUp.found(how.output).has(name, command):
            print(f"{name}: in {how.output} already")
            continue
        with _bars() as progress:
            figures = RUN[name](how, progress)
        HoldingUp.found(how.output).with_part(name, figures, command, how.seed).save(how.output)
        print(f"{name}: {figures}")


if __name__ == "__main__":
    run(tyro.cli(Endurance, prog="python -m tests.stress.runs", use_underscores=True))
