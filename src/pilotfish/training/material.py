"""What a distillation works on: the base pipeline, prompts and, for one source, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pilotfish import bundled
from pilotfish.conditioning import Prompts, encoded, time_ids
from pilotfish.data.images import from_pixels, load_images
from pilotfish.data.prompts import ConcatTexts, open_prompts
from pilotfish.guides import Guide
from pilotfish.noise import NoisePath
from pilotfish.pipelines.loading import fine_tuned_weights, load_pipeline
from pilotfish.pipelines.sampling import at_once
from pilotfish.teacher import Student, Teacher
from pilotfish.training.config import ConfigError, TrainingConfig


@dataclass
class Material:
    """See the module.

    Attributes:
        pipe: the base pipeline.
        prompts: texts to train on; they may lie on a disk.
        held_out: texts to validate on.
        apart: whether those take no part in training.
        picture_folder: captioned pictures, for noised states.
    """

    pipe: Any
    prompts: Sequence[str]
    held_out: Sequence[str]
    picture_folder: Path | None = None
    apart: bool = True
    schedule: NoisePath = field(init=False)

    def __post_init__(self) -> None:
        self.schedule = NoisePath.of(self.pipe.scheduler)

    @classmethod
    def of(cls, config: TrainingConfig, pictures: str | None = None) -> Material:
        """What a configuration names; the embedded model's where it names nothing.

        ``pictures`` is a folder with metadata.jsonl, for noised states.

        Raises:
            ConfigError, PipelineError, ValueError: a path is wrong or holds nothing of use.
        """
        if config.pretrained_model_name_or_path is None:
            pipe: Any = bundled.load_model("base")
        else:
            pipe = load_pipeline(config.pretrained_model_name_or_path)
            if config.prompts is None:
                raise ConfigError("--prompts is needed with a base of your own: one prompt a line")

        def given(where: str) -> Sequence[str]:
            return open_prompts(
                where, config.caption_column, config.prompts_split, config.skip_missing_captions
            )

        prompts = given(config.prompts) if config.prompts else bundled.prompts("training")
        apart = bool(config.validation_prompts) or not config.prompts
        if config.validation_prompts:
            held_out = given(config.validation_prompts)
        else:
            held_out = bundled.prompts("held_out") if apart else prompts[:64]
        if pictures is None and config.pretrained_model_name_or_path is None:
            pictures = str(bundled.images("base"))
        folder = Path(pictures) if pictures else None
        return cls(pipe, prompts, held_out, folder, apart)

    def fine_tunes(self, names: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """The weights of fine-tunes of the base: those that are carried, by their names, or
        folders and hub ids.

        Raises:
            PipelineError: there is none, or it is no fine-tune of this base.
        """
        return [fine_tuned_weights(self.pipe.unet, bundled.train_finetune(n)) for n in names]

    def hold_in(self, dtype: torch.dtype) -> None:
        """Turn the frozen networks that take part in training to a precision. The VAE, which draws
        for validation alone and may overflow in half precision, stays as it is."""
        for name in ("unet", "text_encoder", "text_encoder_2"):
            if (network := getattr(self.pipe, name, None)) is not None:
                nn.Module.to(network, dtype=dtype)  # diffusers' own warns, though nothing is kept

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents."""
        size = self.pipe.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.pipe.unet.config.in_channels, height, width

    @cached_property
    def texts(self) -> Prompts:
        """``prompts``, then ``held_out``, by their index."""
        return encoded(self.pipe, ConcatTexts(self.prompts, self.held_out))

    def teacher(self) -> Teacher:
        """The base's two passes, over training and held-out prompts."""
        return Teacher(self.pipe.unet, self.texts, time_ids(self.pipe))

    def student(self, guide: Guide) -> Student:
        """The base with a guide on it."""
        return Student(guide, self.pipe.unet, time_ids(self.pipe))

    @cached_property
    @torch.no_grad()
    def pictures(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean latents (M, C, h, w) of the pictures and (M,) the prompt index of each.

        Raises:
            ConfigError: a caption that is not among the prompts.
        """
        if self.picture_folder is None:
            raise ConfigError("--states noised needs --pictures, a folder with metadata.jsonl")
        size = self.latent_shape[1] * int(self.pipe.vae_scale_factor)
        pictures = load_images(self.picture_folder, size)
        captions = set(pictures.captions)
        place = {text: i for i, text in enumerate(self.prompts) if text in captions}
        missing = [c for c in pictures.captions if c not in place]
        if missing:
            raise ConfigError(f"{len(missing)} captions are not among the prompts: {missing[:3]}")
        vae = self.pipe.vae
        latents = [
            vae.encode(from_pixels(part).to(vae.device, vae.dtype)).latent_dist.mean
            for part in pictures.pixels.split(at_once(size, size))
        ]
        prompt = torch.tensor([place[c] for c in pictures.captions])
        return torch.cat(latents).float().cpu() * vae.config.scaling_factor, prompt
