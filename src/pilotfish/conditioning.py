"""Prompts by their index, encoded by a pipeline as its user's call would encode them.

Few prompts are encoded once and kept. Of many, each batch is encoded when it is needed, so that
neither the texts nor their embeddings need to lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch

from pilotfish.backbones import Backbone
from pilotfish.interface import TextConditions

NULL = -1
"""The index of the null prompt."""
CACHE_BYTES = 2**29
"""Bytes that encoded prompts may take in memory."""
BATCH = 64

Role = Literal["prompt", "negative", "null"]
"""What a text is to a pipeline; the null prompt has none."""
Encode = Callable[[Role, Sequence[str]], TextConditions]


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
        encode: encodes them, or reads what was encoded before.
        texts: a list, or a column of a data set on a disk.
        other_negatives: whether a text is encoded in another way as negative prompt.
    """

    def __init__(
        self, encode: Encode, texts: Sequence[str], other_negatives: bool = True
    ) -> None:  # fmt: skip
        self.encode, self.texts, self.null = encode, texts, encode("null", [""])
        self.role: Role = "negative" if other_negatives else "prompt"

    def __call__(self, index: torch.Tensor) -> TextConditions:
        return self._encoded(index, "prompt")

    def negative(self, index: torch.Tensor) -> TextConditions:
        return self._encoded(index, self.role)

    def _encoded(self, index: torch.Tensor, role: Role) -> TextConditions:
        different, place = index.unique(return_inverse=True)
        wanted = [int(i) for i in different if i != NULL]
        parts = [self.encode(role, [self.texts[i] for i in wanted])] if wanted else []
        if len(wanted) < len(different):  # unique sorts, so the null prompt is the first
            parts.insert(0, self.null)
        return TextConditions.cat(parts)[place.to(self.null.device)]


def encoded(
    pipe: Any, texts: Sequence[str], cache_bytes: int = CACHE_BYTES, encode: Encode | None = None
) -> Prompts:  # fmt: skip
    """Texts by their index, kept in memory where they take at most ``cache_bytes``.

    Args:
        encode: in place of the pipeline; see :func:`encode_as`.
    """
    encode = encode or partial(encode_as, pipe)
    null, other = encode("null", [""]), Backbone.of_pipeline(pipe).other_negatives

    def fits(one: TextConditions) -> bool:
        return (1 + other) * one.nbytes * len(texts) <= cache_bytes

    # all take the length of the longest, where an encoder gives texts their own length
    if not (fits(null) and fits(encode("prompt", [max(texts, key=len, default="")]))):
        return PromptEncoder(encode, texts, other)

    def table(role: Role) -> TextConditions:
        return TextConditions.cat([*(encode(role, some) for some in batches(texts)), null])

    return PromptTable(table("prompt"), table("negative") if other else None)


def batches(texts: Sequence[str]) -> Iterator[Sequence[str]]:
    """Texts as they are encoded, :data:`BATCH` at once."""
    for start in range(0, len(texts), BATCH):
        yield texts[start : start + BATCH]


def some_or_one(prompts: Prompts, index: torch.Tensor) -> TextConditions:
    """The negative prompts of indices (N,), but a single one where all are the null prompt: a guide
    then computes its part once."""
    return prompts.null if (index == NULL).all() else prompts.negative(index)


@torch.no_grad()
def encode_as(
    pipe: Any, role: Role, texts: Sequence[str], device: torch.device | None = None
) -> TextConditions:  # fmt: skip
    """Texts by the pipeline's own ``encode_prompt``.

    Args:
        role: of all texts. The null prompt is the negative prompt of a call that gives none: the
            empty text, or zeros where a pipeline of SDXL is made that way; a space where a call
            without one has no guidance.
        texts: N; of the null prompt they have no effect but their number, 1.
        device: where the text encoders are. Default: where the pipeline runs.
    """
    backbone = Backbone.of_pipeline(pipe)
    if role == "null":
        if backbone.separate_negative:
            return encode_as(pipe, "prompt", [backbone.null_text], device)
        return _negative(pipe, [""], None, device)
    if role == "negative" and backbone.other_negatives:
        return _negative(pipe, [""] * len(texts), list(texts), device)
    if backbone.pads_to_longest:  # one by one: padding would count
        return TextConditions.cat([_encode(pipe, [text], device)[0] for text in texts])
    return _encode(pipe, texts, device)[0]


def _negative(
    pipe: Any, texts: Sequence[str], negatives: Sequence[str] | None, device: torch.device | None
) -> TextConditions:  # fmt: skip
    made = _encode(pipe, texts, device, negatives)[1]
    assert made is not None
    return made


def _encode(
    pipe: Any, texts: Sequence[str], device: torch.device | None, *negatives: Sequence[str] | None
) -> tuple[TextConditions, TextConditions | None]:
    backbone = Backbone.of_pipeline(pipe)
    arguments: dict[str, Any] = dict(backbone.text_length(pipe))
    if any(negatives):
        arguments["negative_prompt"] = negatives[0]
    if not backbone.separate_negative:
        arguments["do_classifier_free_guidance"] = bool(negatives)
    made = pipe.encode_prompt(
        **backbone.encoding(texts), **arguments, device=device or pipe._execution_device
    )
    return backbone.split_encoded(made)
