"""Sampling as an iterable that everything else consumes.

:func:`sample` calls a pipeline as its user would and yields one :class:`Sample` for each
image or video; grids, metrics and the command line all read from it. :func:`cfg_trajectories` gives
the teacher's own sampling step by step, for the guidance error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Protocol

import torch
from PIL import Image

from pilotfish.backbones import Backbone
from pilotfish.noise import NoisePath
from pilotfish.teacher import Teacher


class Attachable(Protocol):
    """What a pipeline samples with in place of CFG: a guide, or a rule for some of the steps."""

    def attached(self, pipe: Any) -> AbstractContextManager[Any]:
        """The pipeline with it, until the block ends."""
        ...


@dataclass(frozen=True)
class Sample:
    """One image or video.

    Attributes:
        prompt: its text.
        seed: the seed of its first latents; the same seed starts from the same noise
            in every guidance mode.
        latents: (C, h, w) final latents, as the sampler left them; packed ones as a map. Of a
            video (C, F, h, w).
        image: (3, H, W) decoded image in [-1, 1]; (3, T, H, W) of a video.
    """

    prompt: str
    seed: int
    latents: torch.Tensor
    image: torch.Tensor


def sample(
    pipe: Any,
    prompts: Sequence[str],
    *,
    seeds: Sequence[int],
    guidance_scale: float,
    num_inference_steps: int = 25,
    guide: Attachable | None = None,
    negative_prompts: Sequence[str] | None = None,
    num_frames: int | None = None,
    batch_size: int = 32,
    **call: Any,
) -> Iterator[Sample]:
    """Images of ``prompts``, one seed each, in order.

    Args:
        pipe: a pipeline of text to image or video.
        seeds: as many as prompts.
        guidance_scale: w; 1 is no guidance.
        guide: attached while a batch is sampled, if given; else the pipeline runs as it is.
        negative_prompts: as many as prompts; left out, the null prompt.
        num_frames: of a video; left out, the pipeline's own number.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: prompts, seeds or negative prompts differ in number; no step, or an empty batch;
            ``num_frames`` that the pipeline does not take. Raised before sampling.
    """
    if num_frames is not None:
        Backbone.of_pipeline(pipe).latent_frames_of(pipe, num_frames)
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds")
    if negative_prompts is not None and len(negative_prompts) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(negative_prompts)} negative prompts")
    for name, value in (("num_inference_steps", num_inference_steps), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    call["num_inference_steps"] = num_inference_steps
    batches = (slice(i, i + batch_size) for i in range(0, len(prompts), batch_size))
    return _drawn(
        pipe, prompts, seeds, guidance_scale, guide, negative_prompts, num_frames, batches, call
    )


@torch.no_grad()
def _drawn(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], guidance_scale: float,
    guide: Attachable | None, negative_prompts: Sequence[str] | None, num_frames: int | None,
    batches: Iterable[slice], call: dict[str, Any],
) -> Iterator[Sample]:  # fmt: skip
    backbone = Backbone.of_pipeline(pipe)
    for batch in batches:
        texts, some = list(prompts[batch]), seeds[batch]
        negatives = negative_prompts and negative_prompts[batch]
        given = backbone.call_arguments(pipe, guidance_scale, len(texts), negatives, num_frames)
        given |= call
        # attached for one batch only: between two of them the pipeline is its owner's
        with guide.attached(pipe) if guide is not None else nullcontext(), _no_progress_bar(pipe):
            latents = pipe(
                prompt=texts,
                generator=[torch.Generator().manual_seed(s) for s in some],
                output_type="latent",
                **given,
            )[0]
        latents = backbone.final_latents(latents, pipe, given)
        # videos one by one: those of a batch may take gigabytes
        videos = (decode(pipe, z[None])[0] for z in latents)
        images = videos if latents.ndim == 5 else decode(pipe, latents)
        for text, seed, z, x in zip(texts, some, latents.float(), images, strict=True):
            yield Sample(text, seed, z, x)


@contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def _vae_device(pipe: Any) -> Any:
    """Where the VAE computes: between two calls an offloaded one is elsewhere."""
    vae = pipe.vae
    offloaded = hasattr(vae, "_hf_hook") or hasattr(vae, "_diffusers_hook")
    return pipe._execution_device if offloaded else vae.device


@torch.no_grad()
def decode(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) latents to (N, 3, H, W) images in [-1, 1], as the pipeline decodes them; those
    of videos, (N, C, F, h, w), to (N, 3, T, H, W)."""
    vae, backbone = pipe.vae, Backbone.of_pipeline(pipe)
    overflows = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if overflows:
        vae.to(torch.float32)
    latents = backbone.to_vae(vae, latents.to(_vae_device(pipe), vae.dtype))
    *frames, height, width = latents.shape[2:]
    scale = backbone.vae_factor(pipe)
    count = at_once(prod(frames) * height * scale, width * scale)
    latents = latents[:, :, None] if backbone.video_vae else latents
    try:
        parts = [
            vae.decode(part, **backbone.decoding(vae, part), return_dict=False)[0]
            for part in latents.split(count)
        ]
    finally:
        if overflows:
            vae.to(torch.float16)
    images = torch.cat(parts).float().clamp(-1, 1)
    return images[:, :, 0] if backbone.video_vae else images


@torch.no_grad()
def encode(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W) images in [-1, 1] to (N, C, h, w) latents on the CPU, as :func:`decode` takes
    them."""
    vae, backbone = pipe.vae, Backbone.of_pipeline(pipe)
    parts = images.split(at_once(*images.shape[2:]))
    frames = [part[:, :, None] if backbone.video_vae else part for part in parts]
    made = [vae.encode(part.to(_vae_device(pipe), vae.dtype)) for part in frames]
    # Sana's has no distribution
    found = [e.latent_dist.mean if hasattr(e, "latent_dist") else e.latent for e in made]
    latents = torch.cat(found).float().cpu()
    return backbone.from_vae(vae, latents[:, :, 0] if backbone.video_vae else latents)


def middle_frame(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) of a video (3, T, H, W), which stands for it in grids, previews and scores; an
    image (3, H, W) as it is."""
    # a copy: the memory of the video is free
    return image if image.ndim == 3 else image[:, image.shape[1] // 2].clone()


def to_pil(pipe: Any, image: torch.Tensor) -> list[Image.Image]:
    """The frames of a video (3, T, H, W) in [-1, 1], or an image (3, H, W) as the only one."""
    processor = getattr(pipe, "video_processor", None) or pipe.image_processor
    frames = image[None] if image.ndim == 3 else image.transpose(0, 1)
    made: list[Image.Image] = processor.postprocess(frames, output_type="pil")
    return made


def image_size(pipe: Any) -> int:
    """Pixels of an image of the denoiser's own size, each way; of one that is not square, and of
    a frame of a video, its height."""
    backbone = Backbone.of_pipeline(pipe)
    return backbone.latent_shape()[-2] * backbone.packing * backbone.vae_factor(pipe)


def at_once(height: int, width: int) -> int:
    """How many images of so many pixels a VAE takes in one call: as many as have the pixels of one
    of SDXL's, whose activations alone are gigabytes."""
    return max(1, 1024 * 1024 // (height * width))


def final_latents(
    path: NoisePath, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    noise: torch.Tensor, num_inference_steps: int,
) -> torch.Tensor:  # fmt: skip
    """(N, C, h, w) where deterministic steps from noise lead.

    Args:
        predict: of latents (N, C, h, w) at times (N,).
    """
    latents = noise
    for t, to in pairwise(path.grid(num_inference_steps)):
        here, there = t.expand(len(latents)), to.expand(len(latents))
        latents = path.step(latents, predict(latents, here), here, there)
    return latents


@dataclass(frozen=True)
class TeacherStep:
    """One step of CFG sampling: the latents, where they stand, what the base says of them.

    Attributes:
        latents: (N, C, h, w).
        time: (N,) all the same.
        prompt: (N,) index of the prompt.
        negative: (N,) index of the null or negative prompt.
        conditional: (N, C, h, w).
        cfg: (N, C, h, w) equation (1).
    """

    latents: torch.Tensor
    time: torch.Tensor
    prompt: torch.Tensor
    negative: torch.Tensor
    conditional: torch.Tensor
    cfg: torch.Tensor


def cfg_trajectories(
    teacher: Teacher,
    path: NoisePath,
    prompt: torch.Tensor,
    negative: torch.Tensor,
    latents: torch.Tensor,
    guidance_scale: float,
    num_inference_steps: int = 25,
) -> Iterator[TeacherStep]:
    """Sample from noise ``latents`` (N, C, h, w) by the teacher's CFG in deterministic
    steps, with the texts of indices ``prompt`` and ``negative`` (N,)."""
    for t, to in pairwise(path.grid(num_inference_steps)):
        here, there = t.expand(len(latents)), to.expand(len(latents))
        unconditional, conditional = teacher(latents, here, prompt, negative)
        cfg = teacher.guided(unconditional, conditional, guidance_scale)
        yield TeacherStep(latents, here, prompt, negative, conditional, cfg)
        latents = path.step(latents, cfg, here, there)
