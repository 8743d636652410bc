"""Prompts by their index, encoded by a pipeline as its user's call would encode them.

Few prompts are encoded once and kept. Of many, each batch is encoded when it is needed, so that
neither the texts nor their embeddings need to lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from pilotfish.backbones import Backbone
from pilotfish.interface import TextConditions

NULL = -1
"""The index of the null prompt."""
CACHE_BYTES = 2**29
"""Bytes that encoded prompts may take in memory."""
BATCH = 64


Encode = Callable[[Any, Sequence[str]], TextConditions]


class Prompts(Protocol):
    """Encoded prompts by index, on the denoiser's device."""

    @property
    def null(self) -> TextConditions:
        """The null prompt, N = 1."""
        ...

    def __call__(self, index: torch.Tensor) -> TextConditions:
        """The prompts of indices (N,), where NULL is the null prompt."""
        ...

    def negative(self, index: torch.Tensor) -> TextConditions:
        """The same texts as negative prompts: some pipelines encode these in another way."""
        ...


class PromptTable:
    """Prompts that are kept in memory.

    Args:
        conditions: of every prompt, the null prompt last.
        negatives: the same as negative prompts, where they differ.
    """

    def __init__(self, conditions: TextConditions, negatives: TextConditions | None = None) -> None:
        self.conditions, self.null = conditions, conditions[slice(NULL, None)]
        self.negatives = conditions if negatives is None else negatives

    def __call__(self, index: torch.Tensor) -> TextConditions:
        return self.conditions[index.to(self.conditions.device)]

    def negative(self, index: torch.Tensor) -> TextConditions:
        return self.negatives[index.to(self.negatives.device)]


class PromptEncoder:
    """Prompts that are encoded when they are needed.

    Args:
        pipe: the pipeline that encodes them.
        texts: a list, or a column of a data set on a disk.
    """

    def __init__(self, pipe: Any, texts: Sequence[str]) -> None:
        self.pipe, self.texts, self.null = pipe, texts, null_prompt(pipe)

    def __call__(self, index: torch.Tensor) -> TextConditions:
        return self._encoded(index, encode_prompts)

    def negative(self, index: torch.Tensor) -> TextConditions:
        return self._encoded(index, encode_negatives)

    def _encoded(self, index: torch.Tensor, encode: Encode) -> TextConditions:
        different, place = index.unique(return_inverse=True)
        wanted = [int(i) for i in different if i != NULL]
        parts = [encode(self.pipe, [self.texts[i] for i in wanted])] if wanted else []
        if len(wanted) < len(different):  # unique sorts, so the null prompt is the first
            parts.insert(0, self.null)
        return TextConditions.cat(parts)[place.to(self.null.device)]


def encoded(pipe: Any, texts: Sequence[str], cache_bytes: int = CACHE_BYTES) -> Prompts:
    """Texts by their index, kept in memory where they take at most ``cache_bytes``."""
    null, other = null_prompt(pipe), Backbone.of_pipeline(pipe).other_negatives
    if (1 + other) * null.nbytes * len(texts) > cache_bytes:
        return PromptEncoder(pipe, texts)
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]

    def table(encode: Encode) -> TextConditions:
        return TextConditions.cat([*(encode(pipe, batch) for batch in batches), null])

    return PromptTable(table(encode_prompts), table(encode_negatives) if other else None)


def some_or_one(prompts: Prompts, index: torch.Tensor) -> TextConditions:
    """The negative prompts of indices (N,), but a single one where all are the null prompt: a guide
    then computes its part once."""
    return prompts.null if (index == NULL).all() else prompts.negative(index)


@torch.no_grad()
def encode_prompts(pipe: Any, texts: Sequence[str]) -> TextConditions:
    """Texts by the pipeline's own ``encode_prompt``."""
    if Backbone.of_pipeline(pipe).pads_to_longest:  # one by one: padding would count
        return TextConditions.cat([_encode(pipe, [text])[0] for text in texts])
    return _encode(pipe, texts)[0]


@torch.no_grad()
def encode_negatives(pipe: Any, texts: Sequence[str]) -> TextConditions:
    """Texts as negative prompts."""
    if not Backbone.of_pipeline(pipe).other_negatives:
        return encode_prompts(pipe, texts)
    negative = _encode(pipe, [""] * len(texts), list(texts))[1]
    assert negative is not None
    return negative


@torch.no_grad()
def null_prompt(pipe: Any) -> TextConditions:
    """The negative prompt of a call that gives none: the empty text, or zeros where a pipeline of
    SDXL is made that way; a space where a call without one has no guidance."""
    backbone = Backbone.of_pipeline(pipe)
    if backbone.separate_negative:
        return encode_prompts(pipe, [backbone.null_text])
    negative = _encode(pipe, [""], None)[1]
    assert negative is not None
    return negative


def _encode(
    pipe: Any, texts: Sequence[str], *negatives: Sequence[str] | None
) -> tuple[TextConditions, TextConditions | None]:
    backbone = Backbone.of_pipeline(pipe)
    arguments: dict[str, Any] = dict(backbone.text_length(pipe))
    if any(negatives):
        arguments["negative_prompt"] = negatives[0]
    if not backbone.separate_negative:
        arguments["do_classifier_free_guidance"] = bool(negatives)
    made = pipe.encode_prompt(
        **backbone.encoding(texts), **arguments, device=pipe._execution_device
    )  # fmt: skip
    return backbone.split_encoded(made)
