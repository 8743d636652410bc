"""The data of a training: the base pipeline, prompts and, for one source of samples, images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import nn

from pilotfish import bundled
from pilotfish.backbones import Backbone
from pilotfish.conditioning import Prompts, encoded
from pilotfish.data.images import from_pixels, load_images, metadata_file
from pilotfish.data.prompts import ConcatTexts, open_prompts
from pilotfish.guidances import CFG, Guidance
from pilotfish.guides import Guide
from pilotfish.noise import NoisePath
from pilotfish.pipelines.loading import (
    fine_tuned_weights,
    load_denoiser,
    load_pipeline,
    use_deterministic_scheduler,
    weaker_denoiser,
)
from pilotfish.pipelines.sampling import encode, image_size
from pilotfish.teacher import Sizes, Student, Teacher, checksum
from pilotfish.training.config import ConfigError, TrainingConfig, sides
from pilotfish.training.embeddings import cached_prompts, free_text_encoders, text_encoders
from pilotfish.training.quantization import quantize

BASE_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TIMEOUT = timedelta(hours=6)
"""How long processes wait for the first, which encodes prompts and validates alone."""


@dataclass(frozen=True)
class ImageSize:
    """A size of images.

    Attributes:
        shape: (C, h, w) of the latents; (C, F, h, w) of a video.
        path: the noise path, which depends on the size where a scheduler shifts by it.
        conditions: (1, k) what the denoiser is told of the size, if anything.
    """

    shape: tuple[int, ...]
    path: NoisePath
    conditions: torch.Tensor | None


@dataclass
class TrainingContext:
    """See the module.

    Attributes:
        pipe: the base pipeline.
        prompts: texts to train on; they may be on a disk.
        validation_prompts: texts to validate on.
        image_folder: captioned images, for noised samples.
        held_out: whether the validation prompts take no part in training.
        path: the noise path of the pipeline's scheduler, for images of the first size.
        backbone: the family's view of the denoiser, at the first size.
        resolutions: sizes of images, ``WIDTHxHEIGHT``; none is the pipeline's own.
        num_frames: of a video; None is the pipeline's own.

    Raises:
        ConfigError: the base is not one of text to image or video, has two denoisers, or its
            scheduler counts other timesteps than its denoiser.
    """

    pipe: Any
    prompts: Sequence[str]
    validation_prompts: Sequence[str]
    image_folder: Path | None = None
    held_out: bool = True
    path: NoisePath = field(init=False)
    backbone: Backbone = field(init=False)
    resolutions: tuple[str, ...] = field(init=False, default=())
    num_frames: int | None = field(init=False, default=None)
    _sha256: str | None = field(init=False, default=None)  # of a base that is quantised now

    def __post_init__(self) -> None:
        self.backbone = Backbone.of_pipeline(self.pipe)
        self.path = self.backbone.noise_path(self.pipe)
        shape = self.backbone.denoiser.config
        if self.backbone.needs_image(self.pipe):
            raise ConfigError(
                f"the base is a {type(self.pipe).__name__}, which needs an image as input; train a "
                "guide on a pipeline of text to image or video"
            )
        if len(Backbone.all_of_pipeline(self.pipe)) > 1:
            raise ConfigError(
                f"the base is a {type(self.pipe).__name__} with two denoisers, and a guide is "
                "trained on one: train it on a model of the same shape that has one, such as Wan "
                "2.1, and attach it to this one"
            )
        predicted = (shape.get("out_channels") or shape.in_channels) * self.backbone.packing**2
        if shape.in_channels > predicted:
            raise ConfigError(
                f"the base takes {shape.in_channels} channels and predicts {shape.out_channels}: "
                "it needs an image as input; train a guide on a text-to-image model"
            )
        own, scheduled = self.backbone.num_train_timesteps, self.path.num_train_timesteps
        if scheduled != own:
            raise ConfigError(
                f"the base's scheduler has {scheduled} num_train_timesteps, but a "
                f"{type(self.denoiser).__name__} is trained with {own}; give the pipeline a "
                f"scheduler with {own}"
            )

    @classmethod
    def from_config(cls, config: TrainingConfig) -> TrainingContext:
        """The data that a configuration names; the bundled model's where it names none.

        Raises:
            ConfigError, PipelineError, ValueError: a path is wrong or has no usable content.
        """
        base = config.pretrained_model_name_or_path
        is_bundled = base is None or bundled.is_base(base)
        noised = getattr(config, "training_samples", None) == "noised"
        images = getattr(config, "train_images", None)
        if not is_bundled and config.prompts is None:
            raise ConfigError("--prompts is needed with a base of your own: one prompt a line")
        if not is_bundled and noised and images is None:
            raise ConfigError(
                "--training_samples noised needs --train_images with a base of your own: a "
                "folder with metadata.jsonl"
            )

        def given(where: str) -> Sequence[str]:
            return open_prompts(
                where, config.caption_column, config.prompts_split, config.skip_missing_captions
            )

        prompts = given(config.prompts) if config.prompts else bundled.prompts("training")
        held_out = bool(config.validation_prompts) or not config.prompts
        if config.validation_prompts:
            validation = given(config.validation_prompts)
        else:
            validation = bundled.prompts("held_out") if held_out else prompts[:64]
        if images is None and is_bundled:
            images = bundled.images(base or "base")
        if images is not None and noised:
            metadata_file(images)  # refuses before the base is loaded
        if base is None or is_bundled:
            pipe: Any = bundled.load_model(base or "base")
        else:
            # the denoiser last: text encoders and denoiser need not be in memory together
            pipe = load_pipeline(
                base, variant=config.variant, dtype=BASE_DTYPES[config.base_dtype],
                vae_dtype=torch.float32, denoiser=config.cache_embeddings is None,
            )  # fmt: skip
        made = cls(pipe, prompts, validation, images and Path(images), held_out)
        if noised and made.backbone.temporal_factor is not None:
            raise ConfigError(
                "--training_samples noised takes images, and the base makes videos: train with "
                "trajectory, on_policy or tracking"
            )
        # refuses before texts are encoded
        made.use_resolutions(config.resolutions, config.num_frames)
        if config.cache_embeddings is not None:
            made.cast(BASE_DTYPES[config.base_dtype])
            on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
            state = PartialState(cpu=on_cpu, timeout=TIMEOUT)
            with state.main_process_first():  # the others then find all of them
                made.cache_embeddings(
                    config.cache_embeddings, state.device, offload=config.offload_text_encoders
                )
            if base is not None and not is_bundled:
                load_denoiser(pipe, base, config.variant)
                made.backbone = Backbone.of_pipeline(pipe)
        return made

    @property
    def denoiser(self) -> Any:
        """The base denoiser."""
        return self.backbone.denoiser

    def fine_tunes(self, names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """The weights of fine-tunes of the base: bundled ones by name, others by folder or hub id.

        Raises:
            PipelineError: there is none, or it is no fine-tune of this base.
        """
        return [fine_tuned_weights(self.denoiser, bundled.train_finetune(n)) for n in names]

    def cast(self, dtype: torch.dtype) -> None:
        """Cast the frozen networks that take part in training. The VAE decodes validation images
        alone and may overflow in half precision, so it is left as it is."""
        for name, part in self.pipe.components.items():
            if isinstance(part, nn.Module) and name != "vae":
                nn.Module.to(part, dtype=dtype)  # diffusers' own method warns

    def place(self, config: TrainingConfig, device: torch.device) -> str:
        """Bring the base into its precision, quantise it and move it to a device. Without text
        encoders the VAE stays where it is; see :meth:`vae_placed`.

        Returns:
            SHA-256 of the denoiser before it was quantised.
        """
        if self._sha256 is None:
            dtype = BASE_DTYPES[config.base_dtype]
            self.cast(dtype)
            found = checksum(self.denoiser)
            if config.base_quantization != "no":
                self._sha256 = found
            quantize(self.denoiser, config.base_quantization, dtype, device)
            # a pipeline encodes texts where its first part is, which may be the VAE
            kept = () if text_encoders(self.pipe) else ("vae",)
            for name, part in self.pipe.components.items():
                if isinstance(part, nn.Module) and name not in kept:
                    nn.Module.to(part, device)
            return found
        return self._sha256

    @contextmanager
    def vae_placed(self) -> Iterator[None]:
        """The VAE on the device of the training inside the block; its memory is free after it."""
        vae = self.pipe.vae
        before = vae.device
        vae.to(self.texts.null.device)
        try:
            yield
        finally:
            vae.to(before)

    def use_resolutions(
        self, resolutions: tuple[str, ...], num_frames: int | None = None
    ) -> None:  # fmt: skip
        """Take images of these sizes, each ``WIDTHxHEIGHT``, or videos of so many frames; none is
        the pipeline's own.

        Raises:
            ConfigError: the base does not take a size.
            ValueError: it does not take so many frames.
        """
        self.resolutions, self.num_frames = resolutions, num_frames
        self.backbone = self._backbones()[0]
        self.path = self.backbone.noise_path(self.pipe)

    def _backbones(self) -> list[Backbone]:
        plain, count = Backbone.of_pipeline(self.pipe), self.num_frames
        frames = None if count is None else plain.latent_frames_of(self.pipe, count)
        try:
            return [
                plain.at(plain.latent_size_of(self.pipe, height, width), frames)
                for width, height in map(sides, self.resolutions)
            ] or [plain.at(None, frames)]
        except ValueError as error:
            raise ConfigError(f"resolutions: {error}") from error

    @property
    def sizes(self) -> list[ImageSize]:
        """The sizes of images, at least one."""
        return [
            ImageSize(one.latent_shape(), one.noise_path(self.pipe), one.sizes(self.pipe))
            for one in self._backbones()
        ]

    def _conditions(self) -> Sizes:
        """What the denoiser is told of the size, by the size of the latents."""
        return {(size.shape[-2], size.shape[-1]): size.conditions for size in self.sizes}

    def use_deterministic_scheduler(self) -> None:
        """Replace the pipeline's scheduler by the deterministic one of stage 2, and the noise path
        with it: alpha after the last step depends on the scheduler."""
        use_deterministic_scheduler(self.pipe)
        self.path = self.backbone.noise_path(self.pipe)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the latents of the first size; (C, F, h, w) of videos."""
        return self.backbone.latent_shape()

    @cached_property
    def texts(self) -> Prompts:
        """``prompts``, then ``validation_prompts``, by their index."""
        return encoded(self.pipe, ConcatTexts(self.prompts, self.validation_prompts))

    def cache_embeddings(
        self, folder: str, device: torch.device, log: Callable[[str], None] = print,
        offload: bool = False,
    ) -> None:  # fmt: skip
        """Take all embeddings from a folder, where those that it lacks are encoded first, and free
        the text encoders. See :func:`~pilotfish.training.embeddings.cached_prompts`."""
        texts = ConcatTexts(self.prompts, self.validation_prompts)
        self.texts = cached_prompts(self.pipe, texts, folder, device, log, offload)
        free_text_encoders(self.pipe)

    def teacher(self, guidance: Guidance = CFG) -> Teacher:
        """The passes of a guidance, over training and validation prompts.

        Raises:
            PipelineError: its weaker model cannot be loaded, or does not go with the base.
        """
        weak = weaker_denoiser(guidance, self.backbone)
        return Teacher(self.denoiser, self.texts, self._conditions(), guidance, weak)

    def student(self, guide: Guide) -> Student:
        """The base with a guide."""
        return Student(guide, self.denoiser, self._conditions())

    @cached_property
    @torch.no_grad()
    def images(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents (M, C, h, w) of the images and (M,) the prompt index of each.

        Raises:
            ConfigError: a caption is not among the prompts.
        """
        if self.image_folder is None:
            raise ConfigError(
                "--training_samples noised needs --train_images, a folder with metadata.jsonl"
            )
        images = load_images(self.image_folder, image_size(self.pipe))
        captions = set(images.captions)
        place = {text: i for i, text in enumerate(self.prompts) if text in captions}
        missing = [c for c in images.captions if c not in place]
        if missing:
            raise ConfigError(f"{len(missing)} captions are not among the prompts: {missing[:3]}")
        prompt = torch.tensor([place[c] for c in images.captions])
        with self.vae_placed():
            return encode(self.pipe, from_pixels(images.pixels)), prompt
