"""How the pipelines of a denoiser family work: texts, scale, schedule, latents and images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from inspect import signature
from math import prod
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from pilotfish.backbones.tokens import to_map
from pilotfish.guidance import classifier_free_guidance
from pilotfish.interface import TextConditions
from pilotfish.noise import NoisePath

NULL_TEXT = " "
"""Stands for no negative prompt where a call without one has no guidance: an empty text is none to
some text encoders."""


class FamilyPipeline(ABC):
    """The part of a :class:`~pilotfish.backbones.Backbone` that concerns its pipelines."""

    denoiser: Any

    def refusal(self, pipe: Any) -> str | None:
        """Why a pipeline with this denoiser cannot take a guide, in words; None if it can."""
        return None

    def needs_image(self, pipe: Any) -> bool:
        """Whether the pipeline's call starts from an image or a video."""
        inputs = {"image", "control_image", "video"}
        return bool(inputs & {*signature(type(pipe).__call__).parameters})

    control_from_prompt: ClassVar[bool] = False
    """Whether the pipeline runs its ControlNet once a step, on the prompt, for both passes."""

    # -- texts ----------------------------------------------------------------------------

    separate_negative: ClassVar[bool] = False
    """Whether the pipeline encodes the negative prompt in another call of ``encode_prompt``."""
    default_negative: ClassVar[str | None] = None
    """The negative prompt that such a pipeline encodes where none is given; None where it then
    makes no second pass."""
    other_negatives: ClassVar[bool] = False
    """Whether the pipeline encodes a text as negative prompt in another way than as prompt."""
    pads_to_longest: ClassVar[bool] = False
    """Whether the pipeline pads the texts of a batch to the longest of them without a mask."""
    negative_from_callback: ClassVar[bool] = False
    """Whether the pipeline takes other embeddings of the negative prompt from a callback."""

    def encoding(self, texts: Sequence[str]) -> dict[str, Any]:
        """Arguments of the pipeline's ``encode_prompt`` for some texts."""
        return {"prompt": list(texts), "num_images_per_prompt": 1}

    def text_length(self, pipe: Any) -> dict[str, int]:
        """The argument of ``encode_prompt`` and of the pipeline's call that shortens what a text
        encoder gives, where its output is zero."""
        return {}

    @abstractmethod
    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        """Prompt and negative prompt in what the pipeline's ``encode_prompt`` returned."""

    @property
    def null_text(self) -> str:
        """The text of the null prompt, where the negative prompt is encoded separately."""
        return NULL_TEXT if self.default_negative is None else self.default_negative

    def negative_arguments(self, pipe: Any, texts: Sequence[str]) -> dict[str, Any]:
        """The arguments of the pipeline's call for some negative prompts."""
        return {"negative_prompt": list(texts)}

    # -- the guidance scale ---------------------------------------------------------------

    cfg_by_argument: ClassVar[bool] = False
    """Whether the family's pipelines decide on classifier-free guidance by comparing the argument
    of the scale with 1, and have no property for it."""
    scale_argument: ClassVar[str] = "guidance_scale"
    """The argument of the pipeline's call that is w."""
    further_scales: ClassVar[tuple[str, ...]] = ()
    """Arguments of the pipeline's call that are w in the steps of further denoisers."""
    scale_offset: ClassVar[float] = 0.0
    """What is added to that argument to give w."""
    guidance_rule: Callable[..., torch.Tensor] = staticmethod(classifier_free_guidance)
    """The teacher's rule: how the pipeline combines the two predictions."""

    def scale_at_step(self, pipe: Any, guidance_scale: Any) -> Any:
        """The argument of the pipeline's call that is w at the running step.

        Args:
            guidance_scale: the pipeline's scale.
        """
        return guidance_scale

    def call_arguments(
        self, pipe: Any, guidance_scale: float, n: int, negatives: Sequence[str] | None = None,
        num_frames: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """The arguments of the pipeline's call for n prompts at a scale w.

        Args:
            negatives: n negative prompts; left out, the null prompt.
            num_frames: of a video; left out, the pipeline's own number.

        Raises:
            ValueError: as :meth:`latent_frames_of`.
        """
        given: dict[str, Any] = {self.scale_argument: guidance_scale - self.scale_offset}
        given |= self.text_length(pipe)
        if num_frames is not None:
            self.latent_frames_of(pipe, num_frames)
            given["num_frames"] = num_frames
        if negatives:  # left out where there is none: to PixArt's pipeline None is no text
            return given | self.negative_arguments(pipe, negatives)
        needs_text = self.separate_negative and self.default_negative is None
        if needs_text and guidance_scale > 1:
            given |= self.negative_arguments(pipe, [self.null_text] * n)
        return given

    # -- the schedule ---------------------------------------------------------------------

    def dynamic_shift(self, scheduler: Any) -> Callable[[int], float] | None:
        """What the pipeline gives a scheduler with dynamic shifting as ``mu`` for images of
        :meth:`latent_shape`, of the number of steps; None where that is not known here."""
        return None

    def time_shift(self, pipe: Any) -> float | None:
        """The shift of the noise levels where the pipeline gives its denoiser the timesteps before
        it, for images of the default size: see :class:`~pilotfish.noise.NoisePath`."""
        return None

    def noise_path(self, pipe: Any) -> NoisePath:
        """The noise path of the pipeline's scheduler, for images of :meth:`latent_shape`.

        Raises:
            ValueError: as :meth:`NoisePath.of`.
        """
        scheduler = pipe.scheduler
        return NoisePath.of(scheduler, self.dynamic_shift(scheduler), self.time_shift(pipe))

    takes_times: ClassVar[bool] = True
    """Whether the pipeline's call takes the times of a schedule. Where it does not, the scheduler
    needs them: see :func:`pilotfish.pipelines.loading.use_deterministic_scheduler`."""

    def even_grid(self, steps: int) -> dict[str, Any]:
        """The arguments of a pipeline's call with which flow matching takes the grid of
        :meth:`~pilotfish.noise.NoisePath.grid`; the scheduler's own is another."""
        if not self.takes_times:
            return {"num_inference_steps": steps}
        return {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}

    # -- latents and images ---------------------------------------------------------------

    packing: ClassVar[int] = 1
    """How many of the VAE's latents are one of the denoiser's, each way; they are its channels."""
    video_vae: ClassVar[bool] = False
    """Whether an image is a video of one frame to the VAE."""
    spatial_factor: ClassVar[str] = "vae_scale_factor"
    """The attribute of the pipeline that is how many pixels are one of the VAE's latents, each
    way."""
    temporal_factor: ClassVar[str | None] = None
    """That which is how many frames are one, but for the first frame, which is one alone. None
    where the pipeline makes images."""
    frame_rate: ClassVar[int] = 16
    """Frames a second of a video."""

    latent_size: tuple[int, int] | None = None
    """(h, w) of the latents, if it is not the default; see :meth:`at`."""
    latent_frames: int | None = None
    """F of a video's, if it is not the default."""

    def at(self, latent_size: tuple[int, int] | None, latent_frames: int | None = None) -> Self:
        """The same for images whose latents are (h, w), or videos whose latents are (F, h, w);
        None is the default."""
        other = copy(self)
        other.latent_size, other.latent_frames = latent_size, latent_frames
        return other

    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the latents; of a video (C, F, h, w)."""
        channels, *frames, height, width = self.default_latent_shape()
        frames = [self.latent_frames] if self.latent_frames else frames
        return channels, *frames, *(self.latent_size or (height, width))

    def vae_factor(self, pipe: Any) -> int:
        """How many pixels are one of the VAE's latents, each way."""
        return int(getattr(pipe, self.spatial_factor))

    def latent_frames_of(self, pipe: Any, num_frames: int) -> int:
        """F of the latents of a video of so many frames.

        Raises:
            ValueError: the VAE does not take so many; or the pipeline makes images.
        """
        if self.temporal_factor is None:
            raise ValueError(f"num_frames is for videos, and a {type(pipe).__name__} makes images")
        factor = int(getattr(pipe, self.temporal_factor))
        if num_frames < 1 or (num_frames - 1) % factor:
            raise ValueError(
                f"num_frames of a {type(pipe).__name__} must be 1 more than a multiple of "
                f"{factor}, such as {max(num_frames - 1, factor) // factor * factor + 1}, not "
                f"{num_frames}"
            )
        return (num_frames - 1) // factor + 1

    def latent_size_of(self, pipe: Any, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the latents of images of so many pixels.

        Raises:
            ValueError: the sides are no multiples of what the denoiser takes.
        """
        config, pixels = self.denoiser.config, self.packing * self.vae_factor(pipe)
        patch = config.get("patch_size") or next(iter(config.get("all_patch_size") or [1]))
        patch = patch if isinstance(patch, int) else int(patch[-1])
        # Qwen-Image's patches are those that the latents are packed by
        unit = pixels * (1 if self.packing > 1 else patch)
        if levels := len(config.get("down_block_types") or ()):
            unit = pixels * 2 ** (levels - 1)
        if height % unit or width % unit:
            raise ValueError(
                f"the sides of images of a {type(pipe).__name__} must be multiples of {unit} "
                f"pixels, not {width}x{height}"
            )
        return height // pixels, width // pixels

    def default_latent_shape(self) -> tuple[int, ...]:
        """:meth:`latent_shape` at the denoiser's own size."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.denoiser.config.in_channels), int(height), int(width)

    def sizes(self, pipe: Any) -> torch.Tensor | None:
        """(1, k) size conditions of the denoiser, for images of :meth:`latent_shape`."""
        return None

    def final_latents(
        self, latents: torch.Tensor, pipe: Any, call: Mapping[str, Any]
    ) -> torch.Tensor:  # fmt: skip
        """The denoiser's latents, (N, C, h, w), or (N, C, F, h, w), of what a pipeline's call
        returned: these, or their tokens (N, h w, C), or (N, F h w, C).

        Args:
            call: the arguments of the call.
        """
        if latents.ndim > 3:
            return latents
        token = self.packing * self.vae_factor(pipe)
        _, *frames, height, width = self.latent_shape()
        if call.get("num_frames"):
            frames = [self.latent_frames_of(pipe, call["num_frames"])]
        sides = {"height": height, "width": width}
        grid = [(call.get(name) or side * token) // token for name, side in sides.items()]
        return to_map(latents, torch.Size([*frames, *grid]))

    def from_vae(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """The denoiser's latents (N, C, h, w) of the VAE's."""
        mean, factor = self.vae_statistics(vae, latents)
        return (F.pixel_unshuffle(latents, self.packing) - mean) * factor

    def to_vae(self, vae: Any, latents: torch.Tensor) -> torch.Tensor:
        """The reverse of :meth:`from_vae`."""
        mean, factor = self.vae_statistics(vae, latents)
        return F.pixel_shuffle(latents / factor + mean, self.packing)

    def decoding(self, vae: Any, latents: torch.Tensor) -> dict[str, Any]:
        """Further arguments of the VAE's ``decode`` for latents (N, ...)."""
        return {}

    def vae_statistics(self, vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
        """What is subtracted from the VAE's latents, packed, and by what they are multiplied then:
        numbers, or (1, C, 1, 1), or (1, C, 1, 1, 1) of videos."""
        config = vae.config
        mean, std = (config.get(f"latents_{name}") for name in ("mean", "std"))
        factor = config.get("scaling_factor", 1.0)
        if mean is None or std is None:
            return config.get("shift_factor") or 0, factor
        means, stds = (
            per_channel(torch.tensor(x).to(like).repeat_interleave(self.packing**2), like)
            for x in (mean, std)
        )
        return means, factor / stds


def per_channel(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(C,) shaped to multiply latents (N, C, ...)."""
    return values.to(like).view(1, -1, *[1] * (like.ndim - 2))


def shift_by_size(scheduler: Any, shape: tuple[int, ...]) -> float:
    """``mu`` of latents (C, ...) that are one token each, by the rule of FLUX.1, which others have
    taken over."""
    config, (_, *grid) = scheduler.config, shape
    mu: float = calculate_shift(
        prod(grid), config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096), config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )  # fmt: skip
    return mu
