"""The bundled models: a small Stable Diffusion of emoji art, its fine-tunes, scorer and guides.

They are a package of their own, ``pilotfish-models``, found here if it is installed.
``recipe`` made them; the model cards name source and licence.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPProcessor

from pilotfish.data.prompts import load_prompts
from pilotfish.guides import Guide
from pilotfish.pipelines.loading import load_pipeline

FOLDER = Path(__file__).parents[2] / "assets" / "pilotfish_models"
BASE = FOLDER / "base"
JUDGE = FOLDER / "scorer"
GUIDES = FOLDER / "guides"
PRACTICE = FOLDER / "train_finetunes"

# host -> the style (folder of pictures) that it draws in
HOSTS = {"base": "noto", "fluent": "fluent", "twemoji": "twemoji", "emojione": "emojione"}
_LORA = {"emojione"}

# the rows of published grids
SHOWN = (
    "owl", "red apple", "rocket", "smiling face with sunglasses", "cactus",
    "birthday cake", "panda", "guitar",
)  # fmt: skip


def load_host(name: str = "base") -> StableDiffusionPipeline:
    """A pipeline in float32: the base, or a fine-tune of it (two full ones and one LoRA).

    Raises:
        ValueError: no such host.
    """
    if name not in HOSTS:
        raise ValueError(f"no embedded host {name!r}; there are {', '.join(HOSTS)}")
    pipe: StableDiffusionPipeline = load_pipeline(BASE)
    if name in _LORA:
        pipe.load_lora_weights(FOLDER / f"{name}-lora")
    elif name != "base":
        pipe.unet = UNet2DConditionModel.from_pretrained(FOLDER / name / "unet")
    return pipe


def load_guide(name: str = "tiny") -> Guide:
    """The guide that was trained for the base, one of :func:`guide_names`."""
    return Guide.from_pretrained(GUIDES / name)


def open_guide(name: str) -> Guide:
    """A carried guide by its name, or any by its folder or hub id; a folder goes first.

    Raises:
        GuideError: no guide could be read.
    """
    if name in guide_names() and not Path(name).exists():
        return load_guide(name)
    return Guide.from_pretrained(name)


def load_judge() -> tuple[CLIPModel, CLIPProcessor]:
    """The judge, a small CLIP over all styles, and its processor."""
    model = CLIPModel.from_pretrained(JUDGE).float().eval()
    return model, CLIPProcessor.from_pretrained(JUDGE)


def prompts(kind: Literal["captions", "training", "held_out"]) -> list[str]:
    """Captions of the pictures; captions and recombinations to train guides on; prompts that
    are in neither."""
    return load_prompts(FOLDER / "prompts" / f"{kind}.txt")


def pictures(host: str) -> Path:
    """The folder of real pictures in the style of a host."""
    return FOLDER / "images" / HOSTS[host]


def practice_names() -> list[str]:
    """The fine-tunes that are carried for guides to practise on; none of them is a host."""
    return sorted(p.name for p in PRACTICE.iterdir() if p.is_dir())


def guide_names() -> list[str]:
    """The guides that are carried."""
    return sorted(p.name for p in GUIDES.iterdir() if (p / "config.json").is_file())
