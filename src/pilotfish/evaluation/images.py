"""Images of one model in several guidance modes, from the same noise, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from pilotfish import bundled
from pilotfish.backbones import Backbone
from pilotfish.data.images import from_pixels, load_images, metadata_file
from pilotfish.evaluation.clip import Scorer
from pilotfish.evaluation.metrics import ScoreMeter, indices
from pilotfish.evaluation.processes import (
    gather_objects,
    gather_shares,
    share,
    total_batch_size,
)
from pilotfish.evaluation.results import Scores
from pilotfish.evaluation.speed import counted_rows
from pilotfish.guidance import GuidanceMode
from pilotfish.pipelines.sampling import Attachable, Sample, image_size, middle_frame, sample

T = TypeVar("T")
TITLES = {"none": "no guidance", "cfg": "CFG", "guided": "guided"}

# (what is being measured, done, of how many)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. It is loaded when its turn comes and released after it.

    Attributes:
        load: returns the pipeline.
        reference_images: folder of real images in its style; None: no Fréchet distance.

    Raises:
        ValueError: that folder has no ``metadata.jsonl``.
    """

    load: Callable[[], Any]
    reference_images: Path | None = None

    def __post_init__(self) -> None:
        if self.reference_images is not None:
            metadata_file(self.reference_images)


def bundled_models(base: str = "base") -> dict[str, ModelSource]:
    """A bundled base and its fine-tunes."""
    return {
        name: ModelSource(partial(bundled.load_model, name), bundled.images(name))
        for name in bundled.BASES[base]
    }


@dataclass(frozen=True)
class ImageBatch:
    """Images of one guidance mode.

    Attributes:
        prompts: N texts.
        latents: (N, C, h, w) final latents.
        images: (N, 3, H, W) in [-1, 1]; of videos their middle frames.
    """

    prompts: list[str]
    latents: torch.Tensor
    images: torch.Tensor

    @classmethod
    def of(cls, samples: Iterable[Sample]) -> ImageBatch:
        """The samples as one batch."""
        rows = [(s.prompt, s.latents, middle_frame(s.image)) for s in samples]
        prompts, latents, images = zip(*rows, strict=True)
        return cls(list(prompts), torch.stack(latents), torch.stack(images))


def spread_prompts(prompts: Sequence[T], samples: int, seed: int) -> tuple[list[T], list[int]]:
    """``samples`` prompts, each with its own seed. Fewer samples than prompts are spread evenly
    over the list, which may be sorted by category; with more, the prompts are repeated.

    Raises:
        ValueError: no prompt, or fewer samples than one.
    """
    if not prompts or samples < 1:
        raise ValueError(f"{samples} samples of {len(prompts)} prompts: at least one of each")
    stride = max(1, len(prompts) // samples)
    texts = [prompts[i * stride % len(prompts)] for i in range(samples)]
    return texts, list(range(seed, seed + samples))


def draw(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, guidance_scale: float,
    num_inference_steps: int, guide: Attachable | None = None,
    negative_prompts: Sequence[str] | None = None, num_frames: int | None = None,
) -> ImageBatch:  # fmt: skip
    """One batch in one mode; every process samples its share of it."""
    mine = share(len(prompts))
    batch = ImageBatch.of(
        sample(
            pipe, [prompts[i] for i in mine], seeds=[seeds[i] for i in mine],
            guidance_scale=guidance_scale, guide=guide, num_frames=num_frames,
            num_inference_steps=num_inference_steps, batch_size=len(mine),
            negative_prompts=negative_prompts and [negative_prompts[i] for i in mine],
        )
    )  # fmt: skip
    return ImageBatch(list(prompts), *gather_shares(len(prompts), batch.latents, batch.images))


def guidance_modes(
    guide: Attachable, guidance_scale: float, reference: Attachable | None = None
) -> dict[str, tuple[float, Attachable | None]]:
    """The guidance scale of a call, and what is attached for it, by guidance mode.

    Args:
        reference: takes CFG's place; see :class:`~pilotfish.pipelines.Reference`.
    """
    return {
        GuidanceMode.NONE: (1.0, None),
        GuidanceMode.CFG: (guidance_scale, reference),
        GuidanceMode.GUIDED: (guidance_scale, guide),
    }


def check_methods(pipe: Any, methods: Iterable[Attachable | None]) -> None:
    """Whether a pipeline takes each of them; each is attached once, before anything is sampled.

    Raises:
        ValueError, GuideError: it does not.
    """
    for method in methods:
        if method is not None:
            with method.attached(pipe):
                pass


def draw_modes(
    pipe: Any, guide: Attachable, prompts: Sequence[str], seeds: Sequence[int], *,
    guidance_scale: float, num_inference_steps: int, batch_size: int,
    reference: Attachable | None = None, num_frames: int | None = None,
) -> Iterator[dict[str, ImageBatch]]:  # fmt: skip
    """Batch after batch, each in every guidance mode. The guide is attached during its own mode
    alone. ``batch_size`` is that of each process, ``reference`` as of :func:`guidance_modes`."""
    modes = guidance_modes(guide, guidance_scale, reference)
    batch_size = total_batch_size(batch_size)
    for i in range(0, len(prompts), batch_size):
        part = slice(i, i + batch_size)
        yield {
            mode: draw(
                pipe, prompts[part], seeds[part], guidance_scale=w, guide=with_guide,
                num_inference_steps=num_inference_steps, num_frames=num_frames,
            )
            for mode, (w, with_guide) in modes.items()
        }  # fmt: skip


def load_reference(pipe: Any, folder: str | Path | None) -> torch.Tensor | None:
    """(M, 3, H, W) reference images in [-1, 1], as large as the pipeline's own."""
    if folder is None:
        return None
    return from_pixels(load_images(folder, image_size(pipe)).pixels)


@dataclass(frozen=True)
class ScoredImages:
    """The images of one mode, as far as they are needed further on.

    Attributes:
        hits: (N,) 1 where the prompt was the first of all names.
        hits5: (N,) 1 where it was among the first five.
        latents: (N, C, h, w) final latents.
        passes: of the denoiser for one image.
    """

    scores: Scores
    hits: torch.Tensor
    hits5: torch.Tensor
    latents: torch.Tensor
    passes: float


class ModelScorer:
    """The scores of one model, mode after mode, from the same prompts and noise.

    Args:
        prompts: prompts of the images; they are among the names.
        names: the names among which the scorer must find the prompt.
        reference_images: folder, the reference of ``fd_clip``.
        samples: images in each mode.
        seed: of the first image; the others follow.
        batch_size: of each process.
        num_frames: of a video; left out, the pipeline's own number.

    Raises:
        ValueError: a prompt that is no name, or fewer than two samples.
    """

    def __init__(
        self, pipe: Any, scorer: Scorer, *, prompts: Sequence[str], names: Sequence[str],
        reference_images: str | Path | None, samples: int, seed: int, batch_size: int = 32,
        num_frames: int | None = None,
    ) -> None:  # fmt: skip
        if samples < 2:
            raise ValueError(f"at least two samples are needed, not {samples}")
        self.pipe, self.scorer, self.batch_size = pipe, scorer, total_batch_size(batch_size)
        self.texts, self.seeds = spread_prompts(prompts, samples, seed)
        self.num_frames = num_frames
        self.prompt = indices(self.texts, names)
        self.names = scorer.texts(list(names))
        self.reference = load_reference(pipe, reference_images)

    def meter(self) -> ScoreMeter:
        """An empty one."""
        return ScoreMeter(self.scorer, self.names, self.reference)

    def score(
        self, guidance_scale: float, num_inference_steps: int, method: Attachable | None = None,
        progress: Progress | None = None, title: str = "images",
    ) -> ScoredImages:  # fmt: skip
        """All images of one mode: with a method at w, or with the pipeline's own CFG."""
        meter, latents, samples, drawn = self.meter(), [], len(self.texts), 0
        report = progress or (lambda what, done, total: None)
        report(title, 0, samples)
        with counted_rows(Backbone.of_pipeline(self.pipe).denoiser) as rows:
            for i in range(0, samples, self.batch_size):
                part = slice(i, i + self.batch_size)
                batch = draw(
                    self.pipe, self.texts[part], self.seeds[part], guidance_scale=guidance_scale,
                    num_inference_steps=num_inference_steps, guide=method,
                    num_frames=self.num_frames,
                )  # fmt: skip
                drawn += len(share(len(batch.prompts)))
                meter.update(batch.images, self.scorer.images(batch.images), self.prompt[part])
                latents.append(batch.latents)
                report(title, min(i + self.batch_size, samples), samples)
        passes = sum(gather_objects(sum(rows))) / sum(gather_objects(drawn))
        first, five = (meter.retrieval.hits(k) for k in (1, 5))
        return ScoredImages(meter.compute(), first, five, torch.cat(latents), passes)


def named_progress(progress: Progress | None, name: str) -> Progress:
    """The same progress, with the name of a model before what is measured."""
    if progress is None:
        return lambda what, done, total: None
    report = progress
    return lambda what, done, total: report(f"{name}: {what}", done, total)
