"""Images on disk, batch by batch, with what they were made of. A stopped row goes on there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pilotfish.backbones import Backbone
from pilotfish.data.images import to_pixels
from pilotfish.evaluation.images import Progress, draw
from pilotfish.evaluation.processes import (
    gather_objects,
    is_main,
    on_main,
    share,
)
from pilotfish.evaluation.protocols.definitions import Case
from pilotfish.evaluation.protocols.methods import Method
from pilotfish.evaluation.results import Saved
from pilotfish.evaluation.speed import counted_rows

RECORD = "made_of.json"


@dataclass(frozen=True)
class ImageRecord(Saved):
    """What the images of a folder were made of.

    Attributes:
        facts: all that they depend on.
        passes: denoiser passes of an image, by the index of the first image of its batch.
    """

    facts: dict[str, str]
    passes: dict[str, float]


class ImageFolder:
    """The images of one method on one model: ``00000.png`` and so on, and ``metadata.jsonl`` with
    their prompts.

    Args:
        folder: is made where it is missing.
        facts: all that the images depend on.
        cases: of the images.
        batch_size: of all processes.

    Raises:
        ValueError: the folder holds images that were made of something else.
    """

    def __init__(
        self, folder: Path, facts: dict[str, str], cases: Sequence[Case], batch_size: int
    ) -> None:
        self.folder, self.facts, self.cases = folder, facts, cases
        self.batch_size = batch_size
        self.finished: dict[str, float] = on_main(self._read)

    @property
    def files(self) -> list[Path]:
        """Of all images, in the order of the cases."""
        return [self.folder / f"{i:05d}.png" for i in range(len(self.cases))]

    @property
    def passes(self) -> float:
        """Denoiser passes of an image, in the mean over those that are finished."""
        counts = {start: len(self.batch(int(start))) for start in self.finished}
        total = sum(self.finished[start] * n for start, n in counts.items())
        return total / sum(counts.values())

    def batch(self, start: int) -> range:
        """The images of the batch that begins with one."""
        return range(start, min(start + self.batch_size, len(self.cases)))

    def unfinished(self) -> list[range]:
        """The batches that are to be sampled."""
        starts = range(0, len(self.cases), self.batch_size)
        return [self.batch(start) for start in starts if str(start) not in self.finished]

    def add(self, batch: range, images: torch.Tensor, passes: float) -> None:
        """Save a batch: (N, 3, H, W) images in [-1, 1], and the passes of each."""
        self.finished[str(batch.start)] = passes
        if not is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for i, pixels in zip(batch, to_pixels(images).permute(0, 2, 3, 1).cpu(), strict=True):
            part = self.folder / f"{i:05d}.part"
            Image.fromarray(pixels.numpy()).save(part, format="PNG")
            part.replace(self.files[i])
        # after its images: what it lists is there
        ImageRecord(self.facts, self.finished).save(self.folder / RECORD)

    def _read(self) -> dict[str, float]:
        """The batches whose images are all there, by the index of their first image."""
        record = self.folder / RECORD
        if record.is_file():
            found = ImageRecord.load(record)
            self._check(found.facts)
            files = self.files
            return {
                start: passes
                for start, passes in found.passes.items()
                if all(files[i].is_file() for i in self.batch(int(start)))
            }
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = (
            {"file_name": file.name, "text": case.prompt}
            for file, case in zip(self.files, self.cases, strict=True)
        )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / "metadata.jsonl").write_text(lines, encoding="utf-8", newline="\n")
        return {}

    def _check(self, found: dict[str, str]) -> None:
        for name in sorted({*self.facts, *found}):
            if self.facts.get(name) != found.get(name):
                raise ValueError(
                    f"{self.folder} holds images of another {name}: {_short(found.get(name))}, not "
                    f"{_short(self.facts.get(name))}; delete the folder or use another --output"
                )


def sample_images(
    pipe: Any, method: Method, images: ImageFolder, seeds: Sequence[int], *, guidance_scale: float,
    num_inference_steps: int, progress: Progress, title: str,
) -> None:  # fmt: skip
    """Sample what is missing. A batch has the same images whatever was finished before it.

    Args:
        images: where they go, and their prompts.
        seeds: one for each image.
        guidance_scale: w of methods with guidance.
        title: of the progress.
    """
    denoiser, total = Backbone.of_pipeline(pipe).denoiser, len(images.cases)
    left = images.unfinished()
    done = total - sum(map(len, left))
    progress(title, done, total)
    for batch in left:
        cases = [images.cases[i] for i in batch]
        with counted_rows(denoiser) as rows:
            drawn = draw(
                pipe, [case.prompt for case in cases], [seeds[i] for i in batch],
                guidance_scale=guidance_scale if method.guided else 1.0, guide=method.make(),
                num_inference_steps=num_inference_steps,
                negative_prompts=(
                    [case.negative_prompt for case in cases] if method.with_negative else None
                ),
            )  # fmt: skip
        mine = len(share(len(batch)))
        passes = sum(gather_objects(sum(rows))) / sum(gather_objects(mine))
        images.add(batch, drawn.images, passes)
        done += len(batch)
        progress(title, done, total)


def _short(fact: str | None) -> str:
    return "none" if fact is None else fact if len(fact) <= 60 else f"{fact[:60]}..."
