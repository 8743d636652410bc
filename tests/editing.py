"""What pipelines need that edit an image: small stand-ins for a text encoder that sees it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from PIL import Image, ImageStat
from transformers import T5EncoderModel
from transformers.modeling_outputs import BaseModelOutput

SIDE = 32
"""Of an image to edit; pipelines make it 1024 pixels wide."""
PREFACE = 64
"""Tokens before those of prompt and image, which the pipelines leave out."""


class Processor:
    """Texts to tokens, images to their mean value."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: Sequence[str], images: Any, padding: bool, return_tensors: str) -> Any:
        prompts = [t.rpartition("vision_end|>")[2].partition("<|im_end")[0] for t in text]
        made = self.tokenizer(prompts, padding=padding, return_tensors=return_tensors)
        for name in ("input_ids", "attention_mask"):
            made[name] = torch.nn.functional.pad(made[name], (PREFACE, 0), value=1)
        images = images if isinstance(images, list) else [images]
        means = torch.tensor([ImageStat.Stat(image).mean[0] / 255 for image in images])
        made["pixel_values"] = means.view(len(text), -1).mean(1)
        return made


class TextEncoder(T5EncoderModel):  # type: ignore[misc]
    """One that adds what it sees to every token."""

    def forward(
        self, pixel_values: torch.Tensor, image_grid_thw: None = None, **given: Any
    ) -> BaseModelOutput:
        made: BaseModelOutput = super().forward(**given)
        assert made.hidden_states is not None
        made.hidden_states = (made.hidden_states[-1] + pixel_values[:, None, None],)
        return made


def resized(pipe: Any, images: list[Image.Image]) -> Any:
    """The images as a pipeline gives them to ``encode_prompt``."""
    return pipe.image_processor.resize(images, SIDE, SIDE)


@contextmanager
def small_images(pipe: Any) -> Iterator[None]:
    """Inside the block a pipeline resizes the images that it edits to few pixels."""
    module = sys.modules[type(pipe).__module__]
    plain = getattr(module, "calculate_dimensions", None)
    if plain is None:
        yield
        return
    with patch.object(module, "calculate_dimensions", lambda area, ratio: plain(SIDE**2, ratio)):
        yield
