"""What each protocol measures, on which prompts, and what it needs that is not in this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pilotfish.data.captions import load_captions, load_pairs

Metric = Literal["clip_score", "fid", "pickscore"]
ProtocolName = Literal["coco2017", "drawbench", "parti", "negative-prompts"]

NEGATIVE_PAIRS = (
    ("a photo of a city street", "cars"),
    ("a portrait of an old man", "beard"),
    ("a photo of a beach", "people"),
    ("a bowl of fruit on a table", "bananas"),
    ("a photo of a mountain landscape", "snow"),
    ("a photo of a harbour", "boats"),
    ("a birthday cake", "candles"),
    ("a photo of an office desk", "computer"),
    ("a farm in the countryside", "cows"),
    ("a pizza on a plate", "tomatoes"),
    ("a photo of a living room", "sofa"),
    ("a photo of a kitchen", "window"),
    ("a woman in a cafe", "coffee cup"),
    ("a photo of a garden", "flowers"),
    ("a photo of a park in autumn", "red leaves"),
    ("a photo of a breakfast", "eggs"),
)
"""A prompt, and a concept that its images often show although the prompt does not name it."""


@dataclass(frozen=True)
class Case:
    """A prompt, and a negative prompt where the protocol has one."""

    prompt: str
    negative_prompt: str = ""


@dataclass(frozen=True)
class Protocol:
    """A protocol.

    Attributes:
        title: its name in tables.
        prompts: what the file of its prompts is, and where it comes from; empty: it has some of
            its own.
        metrics: what is measured unless the user says otherwise.
        images_per_prompt: unless the user says how many samples.
        has_negatives: whether every prompt has a negative prompt, and what is measured is how well
            the images avoid it.
    """

    title: str
    prompts: str
    metrics: tuple[Metric, ...]
    images_per_prompt: int = 1
    has_negatives: bool = False


PROTOCOLS: dict[ProtocolName, Protocol] = {
    "coco2017": Protocol(
        "COCO 2017 validation",
        "captions_val2017.json, in annotations_trainval2017.zip of cocodataset.org",
        ("clip_score", "fid", "pickscore"),
    ),
    "drawbench": Protocol(
        "DrawBench", "a CSV with a column Prompts, or a text file of one prompt a line",
        ("clip_score", "pickscore"),
    ),
    "parti": Protocol(
        "PartiPrompts", "PartiPrompts.tsv, in github.com/google-research/parti",
        ("clip_score", "pickscore"),
    ),
    "negative-prompts": Protocol(
        "Negative prompts", "", ("clip_score",), images_per_prompt=16, has_negatives=True
    ),
}  # fmt: skip


def load_cases(protocol: Protocol, file: str | None) -> list[Case]:
    """The prompts of a protocol, see :mod:`pilotfish.data.captions`.

    Raises:
        ValueError: the file cannot be read, or there is none and the protocol needs one.
    """
    if protocol.has_negatives:
        pairs: Sequence[tuple[str, str]] = load_pairs(file) if file else NEGATIVE_PAIRS
        return [Case(prompt, negative) for prompt, negative in pairs]
    if file is None:
        raise ValueError(f"{protocol.title} needs a file of prompts: {protocol.prompts}")
    return [Case(prompt) for prompt in load_captions(file)]
