"""The bundled models: a small Stable Diffusion and a small Stable Diffusion 3 of emoji art, their
fine-tunes and guides, and the scorer.

They are a package of their own, ``pilotfish-models``, and need not be installed. ``recipe`` made
them; the model cards name source and licence.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from torch import nn
from transformers import CLIPModel, CLIPProcessor

from pilotfish.backbones import Backbone
from pilotfish.data.prompts import load_prompts
from pilotfish.errors import MissingPackageError
from pilotfish.guides import Guide
from pilotfish.pipelines.loading import DTYPE, load_pipeline

BASES = {
    "base": {"base": "noto", "fluent": "fluent", "twemoji": "twemoji", "emojione": "emojione"},
    "sd3": {
        "sd3": "noto", "sd3-fluent": "fluent", "sd3-twemoji": "twemoji",
        "sd3-emojione": "emojione",
    },
}  # fmt: skip
"""Each base and its fine-tunes, and the style (a folder of images) that each was trained on:
Stable Diffusion with a UNet, and Stable Diffusion 3 with a transformer."""
MODELS = BASES["base"]
"""Those of the UNet, on which commands work where nothing is said."""
STYLES = {name: style for models in BASES.values() for name, style in models.items()}
"""All of them."""
STEP_LORA = "step-lora"
"""The UNet's base with a LoRA that draws in 4 steps; no guide was trained on it."""
REFERENCES = STYLES | {STEP_LORA: "noto"}
"""The models whose style has bundled images, and that style."""
GRID_PROMPTS = (
    "owl", "red apple", "rocket", "smiling face with sunglasses", "cactus",
    "birthday cake", "panda", "guitar",
)  # fmt: skip
"""The prompts of the published grids."""

FOLDER: Path
"""The package's folder."""
BASE: Path
SCORER: Path
GUIDES: Path
TRAIN_FINETUNES: Path
TEST_FINETUNES: Path

_FOLDERS = {
    "FOLDER": ".",
    "BASE": "base",
    "SCORER": "scorer",
    "GUIDES": "guides",
    "TRAIN_FINETUNES": "train_finetunes",
    "TEST_FINETUNES": "test_finetunes",
}


def __getattr__(name: str) -> Any:
    """The folders, looked up when they are used: the package may be missing (PEP 562)."""
    if name not in _FOLDERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _folder(_FOLDERS[name])


def installed() -> bool:
    """Whether the package ``pilotfish-models`` is installed."""
    return _package() is not None


def load_model(name: str = "base", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline, a base or a fine-tune of one: one of :func:`model_names`.

    Args:
        dtype: of every network.

    Raises:
        ValueError: there is no such model.
        MissingPackageError: the bundled models are not installed.
    """
    package, names = _folder("."), model_names()
    if name not in names:
        raise ValueError(f"no bundled model {name!r}; there are {', '.join(names)}")
    folder, lora = package / name, package / f"{name}-lora"
    if name == STEP_LORA:
        lora = package / name
    elif name not in STYLES:
        folder = lora = package / "test_finetunes" / name
    pipe: Any = load_pipeline(package / base_of(name), dtype=dtype)
    base = Backbone.of_pipeline(pipe)
    if (lora / LORA_WEIGHT_NAME_SAFE).is_file():
        pipe.load_lora_weights(lora)
    elif name not in BASES:
        tuned = type(base.denoiser).from_pretrained(folder / base.component, **{DTYPE: dtype})
        setattr(pipe, base.component, tuned)
    nn.Module.to(getattr(pipe, base.component), dtype)  # of the LoRA as well
    return pipe


def is_base(name: str) -> bool:
    """Whether a name means a bundled base. A folder of that name takes precedence."""
    return name in BASES and not Path(name).exists()


def base_of(name: str) -> str:
    """The base of a bundled model. Of any other name the UNet's."""
    return next((base for base, models in BASES.items() if name in models), "base")


def guide_of(name: str) -> str:
    """The guide that was trained on a bundled model's base, by its name."""
    base = base_of(name)
    return "tiny" if base == "base" else f"{base}-tiny"


def load_guide(name: str = "tiny") -> Guide:
    """A guide that was trained on one of the bases, one of :func:`guide_names`."""
    return Guide.from_pretrained(_folder("guides") / name)


def open_guide(name: str) -> Guide:
    """A bundled guide by its name, or any guide by its folder or hub id. A folder of that name
    takes precedence.

    Raises:
        GuideError: no guide could be read.
        MissingPackageError: it can only be a bundled guide, and these are not installed.
    """
    return load_guide(name) if _is_bundled(name, guide_names()) else Guide.from_pretrained(name)


def load_scorer() -> tuple[CLIPModel, CLIPProcessor]:
    """The scorer, a small CLIP trained on all styles, and its processor."""
    folder = _folder("scorer")
    return CLIPModel.from_pretrained(folder).float().eval(), CLIPProcessor.from_pretrained(folder)


def prompts(kind: Literal["captions", "training", "held_out"]) -> list[str]:
    """Captions of the images; captions and recombinations to train guides on; prompts that
    are in neither."""
    return load_prompts(_folder("prompts") / f"{kind}.txt")


def images(model: str) -> Path:
    """The folder of real images in the style of one of :data:`REFERENCES`.

    Raises:
        ValueError: there are no images of such a model.
        MissingPackageError: the bundled models are not installed.
    """
    if model not in REFERENCES:
        known = ", ".join(REFERENCES)
        raise ValueError(f"no bundled images of {model!r}; there are those of {known}")
    return _folder("images") / REFERENCES[model]


def train_finetune_names(base: str = "base") -> list[str]:
    """The fine-tunes of a base for fine-tune augmentation; none of them is in :data:`BASES`. Empty
    where the bundled models are not installed."""
    found = {name: _prefix(name) for name in _names("train_finetunes")}
    return [name for name, of in found.items() if of == base]


def model_names() -> list[str]:
    """All that :func:`load_model` knows."""
    return [*STYLES, STEP_LORA, *test_finetune_names()]


def test_finetune_names() -> list[str]:
    """The fine-tunes far from the base, for evaluation: no bundled guide was trained on one.
    None of them is in :data:`BASES`. Empty where the bundled models are not installed."""
    return _names("test_finetunes")


def train_finetune(name: str) -> str | Path:
    """The folder of a bundled fine-tune of that name; any other folder or hub id as it is. A
    folder of that name takes precedence.

    Raises:
        MissingPackageError: it can only be a bundled one, and these are not installed.
    """
    names = [name for base in BASES for name in train_finetune_names(base)]
    return _folder("train_finetunes") / name if _is_bundled(name, names) else name


def guide_names(*bases: str) -> list[str]:
    """The bundled guides of some bases, or of all. Empty where the bundled models are not
    installed."""
    names = _names("guides")
    return [name for base in bases or BASES for name in names if _prefix(name) == base]


def _names(folder: str) -> list[str]:
    return sorted(p.name for p in _folder(folder).glob("*") if p.is_dir()) if installed() else []


def _prefix(name: str) -> str:
    """The base of a guide or a fine-tune for training, by its name."""
    return next((base for base in BASES if name.startswith(f"{base}-")), "base")


def _is_bundled(name: str, names: list[str]) -> bool:
    """Whether a name means something bundled rather than a folder or hub id (which has a slash)."""
    if Path(name).exists() or "/" in name:
        return False
    return name in names or not installed()


@cache
def _package() -> Path | None:
    spec = find_spec("pilotfish_models")
    return Path(spec.origin).parent if spec and spec.origin else None


def _folder(name: str) -> Path:
    package = _package()
    if package is None:
        raise MissingPackageError(
            "the bundled models are not installed: run pip install pilotfish-models, or in a "
            "clone pip install ./assets, or name a model of your own"
        )
    return package / name
