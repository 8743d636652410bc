"""What a protocol needs and what of it is missing, said at once. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from pilotfish import bundled
from pilotfish.evaluation.protocols.definitions import Metric, Protocol

MODELS = (
    "folders of pipelines in diffusers' format, the base first; such as "
    "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir models/sd15"
)
GUIDE = "folder of a guide that pilotfish distill trained on the base"
REFERENCE = "folder of the real images: val2017, from val2017.zip of cocodataset.org"
INCEPTION = (
    "file weights-inception-2015-12-05-6726825d.pth, from the release v0.2.0 of "
    "github.com/toshas/torch-fidelity"
)
CLIP = (
    "folder of a CLIP in transformers' format; such as "
    "hf download openai/clip-vit-large-patch14 --local-dir models/clip-l"
)
PICKSCORE = (
    "folder of PickScore; hf download yuvalkirstain/PickScore_v1 --local-dir models/pickscore"
)


@dataclass(frozen=True)
class Inputs:
    """Paths, as the user gave them.

    Attributes:
        models: bundled models, folders or hub ids.
        guides: bundled guides, folders or hub ids.
        prompts: file of prompts.
        reference_images: folder of real images, for FID.
        inception_weights: file, for FID.
        clip: folder, for the CLIP score.
        pickscore: folder.
    """

    models: Sequence[str]
    guides: Sequence[str]
    prompts: str | None = None
    reference_images: str | None = None
    inception_weights: str | None = None
    clip: str | None = None
    pickscore: str | None = None


def check_inputs(inputs: Inputs, protocol: Protocol, metrics: Collection[Metric]) -> None:
    """Whether all that a protocol needs is there.

    Raises:
        ValueError: naming everything that is missing, and what belongs there.
    """
    missing = [
        *_missing("--models", inputs.models, MODELS, bundled.model_names(), "model_index.json"),
        *_missing("--guide", inputs.guides, GUIDE, bundled.guide_names(), "config.json"),
    ]
    if protocol.prompts or inputs.prompts:
        what = protocol.prompts or "a table with the columns prompt and negative_prompt"
        missing += _missing_path("--prompts", inputs.prompts, what)
    needed = {
        "clip_score": [("--clip", inputs.clip, CLIP)],
        "fid": [
            ("--reference_images", inputs.reference_images, REFERENCE),
            ("--inception_weights", inputs.inception_weights, INCEPTION),
        ],
        "pickscore": [("--pickscore", inputs.pickscore, PICKSCORE)],
    }
    for metric in metrics:
        for flag, path, what in needed[metric]:
            missing += _missing_path(flag, path, what)
    if missing:
        raise ValueError(
            f"{protocol.title} needs what is not here, and nothing is downloaded for you:\n  "
            + "\n  ".join(missing)
            + "\n--metrics names fewer metrics, which need less."
        )


def _missing(
    flag: str, given: Sequence[str], what: str, known: Collection[str], index: str
) -> list[str]:
    """A line for each model or guide that is neither bundled nor on this machine."""
    if not given:
        return [f"{flag}: {what}"]
    return [
        f"{flag} {name}: there is none here; {what}"
        for name in given
        if name not in known and not Path(name).exists() and not _is_cached(name, index)
    ]


def _missing_path(flag: str, path: str | None, what: str) -> list[str]:
    if path is None:
        return [f"{flag}: {what}"]
    return [] if Path(path).exists() else [f"{flag} {path}: there is nothing; {what}"]


def _is_cached(name: str, index: str) -> bool:
    """Whether a hub id is in the cache of huggingface_hub."""
    try:
        return isinstance(try_to_load_from_cache(name, index), str)
    except ValueError:  # no hub id
        return False
