"""The bundled models: a small Stable Diffusion of emoji art, its fine-tunes, scorer and guides.

They are a package of their own, ``pilotfish-models``, and need not be installed. ``recipe`` made
them; the model cards name source and licence.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from transformers import CLIPModel, CLIPProcessor

from pilotfish.data.prompts import load_prompts
from pilotfish.errors import MissingPackageError
from pilotfish.guides import Guide
from pilotfish.pipelines.loading import load_pipeline

MODELS = {"base": "noto", "fluent": "fluent", "twemoji": "twemoji", "emojione": "emojione"}
"""The base and its fine-tunes, and the style (a folder of images) that each was trained on."""
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


def load_model(name: str = "base") -> StableDiffusionPipeline:
    """A pipeline in float32, the base or a fine-tune of it: one of :func:`model_names`.

    Raises:
        ValueError: there is no such model.
        MissingPackageError: the bundled models are not installed.
    """
    package, names = _folder("."), model_names()
    if name not in names:
        raise ValueError(f"no bundled model {name!r}; there are {', '.join(names)}")
    folder, lora = package / name, package / f"{name}-lora"
    if name not in MODELS:
        folder = lora = package / "test_finetunes" / name
    pipe: StableDiffusionPipeline = load_pipeline(package / "base")
    if (lora / LORA_WEIGHT_NAME_SAFE).is_file():
        pipe.load_lora_weights(lora)
    elif name != "base":
        pipe.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    return pipe


def load_guide(name: str = "tiny") -> Guide:
    """A guide that was trained on the base, one of :func:`guide_names`."""
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
    """The folder of real images in the style of one of :data:`MODELS`.

    Raises:
        ValueError: there are no images of such a model.
        MissingPackageError: the bundled models are not installed.
    """
    if model not in MODELS:
        raise ValueError(f"no bundled images of {model!r}; there are those of {', '.join(MODELS)}")
    return _folder("images") / MODELS[model]


def train_finetune_names() -> list[str]:
    """The fine-tunes for fine-tune augmentation; none of them is in :data:`MODELS`. Empty where
    the bundled models are not installed."""
    return _names("train_finetunes")


def model_names() -> list[str]:
    """All that :func:`load_model` knows."""
    return [*MODELS, *test_finetune_names()]


def test_finetune_names() -> list[str]:
    """The fine-tunes far from the base, for evaluation: no bundled guide was trained on one.
    None of them is in :data:`MODELS`. Empty where the bundled models are not installed."""
    return _names("test_finetunes")


def train_finetune(name: str) -> str | Path:
    """The folder of a bundled fine-tune of that name; any other folder or hub id as it is. A
    folder of that name takes precedence.

    Raises:
        MissingPackageError: it can only be a bundled one, and these are not installed.
    """
    return _folder("train_finetunes") / name if _is_bundled(name, train_finetune_names()) else name


def guide_names() -> list[str]:
    """The bundled guides. Empty where the bundled models are not installed."""
    return _names("guides")


def _names(folder: str) -> list[str]:
    return sorted(p.name for p in _folder(folder).glob("*") if p.is_dir()) if installed() else []


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
