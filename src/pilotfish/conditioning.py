"""Prompts by their index, encoded by a pipeline as its user's call would encode them.

Few enough are encoded once and kept; of many, each batch is encoded when it is asked for, so that
neither their texts nor what is made of them need lie in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pilotfish.interface import TextConditions

NULL = -1
"""The index of the null prompt."""
KEPT = 2**29
"""Bytes that encoded prompts may take in memory."""
BATCH = 64


class Prompts(Protocol):
    """Encoded prompts by index, on the denoiser's device."""

    @property
    def null(self) -> TextConditions:
        """The null prompt, N = 1."""
        ...

    def __call__(self, index: torch.Tensor) -> TextConditions:
        """Those of indices (N,), where NULL is the null prompt."""
        ...


class PromptTable:
    """Prompts that are kept as they are.

    Args:
        embeds: of every prompt, the null prompt last.
    """

    def __init__(self, embeds: TextConditions) -> None:
        self.embeds, self.null = embeds, embeds[slice(NULL, None)]

    def __call__(self, index: torch.Tensor) -> TextConditions:
        return self.embeds[index.to(self.embeds.device)]


class PromptEncoder:
    """Prompts that are encoded when they are asked for.

    Args:
        pipe: the pipeline that encodes them.
        texts: a list, or a column of a data set that lies on a disk.
    """

    def __init__(self, pipe: Any, texts: Sequence[str]) -> None:
        self.pipe, self.texts, self.null = pipe, texts, null_prompt(pipe)

    def __call__(self, index: torch.Tensor) -> TextConditions:
        different, place = index.unique(return_inverse=True)
        wanted = [int(i) for i in different if i != NULL]
        parts = [encode_prompts(self.pipe, [self.texts[i] for i in wanted])] if wanted else []
        if len(wanted) < len(different):  # unique sorts, so the null prompt is the first
            parts.insert(0, self.null)
        return TextConditions.cat(parts)[place.to(self.null.device)]


def encoded(pipe: Any, texts: Sequence[str], kept: int = KEPT) -> Prompts:
    """Texts by their index, kept where they take at most so many bytes when they are encoded."""
    null = null_prompt(pipe)
    one = sum(t.nbytes for t in (null.hidden_states, null.pooled) if t is not None)
    if one * len(texts) > kept:
        return PromptEncoder(pipe, texts)
    parts = [encode_prompts(pipe, texts[i : i + BATCH]) for i in range(0, len(texts), BATCH)]
    return PromptTable(TextConditions.cat([*parts, null]))


def some_or_one(prompts: Prompts, index: torch.Tensor) -> TextConditions:
    """Those of indices (N,), but one alone where all are the null prompt: a guide then has to
    look at it once."""
    return prompts.null if (index == NULL).all() else prompts(index)


@torch.no_grad()
def encode_prompts(pipe: Any, texts: Sequence[str]) -> TextConditions:
    """Texts by the pipeline's own ``encode_prompt``."""
    given = {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    made = pipe.encode_prompt(prompt=list(texts), device=pipe._execution_device, **given)
    return TextConditions(made[0], *made[2:3])  # of SDXL: prompt, negative, and both pooled


@torch.no_grad()
def null_prompt(pipe: Any) -> TextConditions:
    """What guidance turns away from where no negative prompt is given: the empty text, or zeros
    where a pipeline of SDXL is made that way."""
    given = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    made = pipe.encode_prompt(prompt="", device=pipe._execution_device, **given)
    return TextConditions(made[1], *made[3:4])


def time_ids(pipe: Any) -> torch.Tensor | None:
    """(1, 6) sizes and crop that SDXL is told for whole pictures of the pipeline's own size; None
    for what is not told any."""
    if pipe.unet.config.addition_embed_type != "text_time":
        return None
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return torch.tensor([[side, side, 0, 0, side, side]], dtype=torch.float32)
