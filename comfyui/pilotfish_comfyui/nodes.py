"""The two nodes: *Load guide* and *Apply guide*."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import folder_paths

from .loading import FOLDER, apply_guide, find_guides, load_guide
from .small_sd3 import register

register()
if FOLDER not in folder_paths.folder_names_and_paths:
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))


def guides() -> dict[str, Path]:
    """The guides in ComfyUI's folders, by name."""
    return find_guides(folder_paths.get_folder_paths(FOLDER))


class LoadGuide:
    """Read a guide from ``models/pilotfish_guides``."""

    CATEGORY = "loaders"
    DESCRIPTION = "Reads a Pilotfish guide: a folder with config.json and weights in safetensors."
    FUNCTION = "load"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("PILOTFISH_GUIDE",)
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("guide",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """The widgets, as ComfyUI asks for them."""
        return {"required": {"guide_name": (sorted(guides()),)}}

    def load(self, guide_name: str) -> tuple[Any]:
        """The guide, as the only output.

        Raises:
            GuideError: no guide can be read there.
        """
        return (load_guide(guides()[guide_name]),)


class ApplyGuide:
    """Put a guide on a model."""

    CATEGORY = "model_patches"
    DESCRIPTION = (
        "The model then samples with one denoiser pass a step where CFG takes two. cfg and the "
        "negative conditioning of the sampler act as before; cfg 1 is the plain model."
    )
    FUNCTION = "apply"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """The widgets, as ComfyUI asks for them."""
        refresh = {
            "default": -1, "min": -1, "max": 1000,
            "tooltip": "how many steps run both passes; -1: the ratio that the guide names",
        }  # fmt: skip
        return {
            "required": {
                "model": ("MODEL",),
                "guide": ("PILOTFISH_GUIDE",),
                "refresh": ("INT", refresh),
            }
        }

    def apply(self, model: Any, guide: Any, refresh: int) -> tuple[Any]:
        """The model with the guide, as the only output.

        Raises:
            GuideError: the model takes no such guide; the message names both.
        """
        return (apply_guide(model, guide, None if refresh < 0 else refresh),)


NODE_CLASS_MAPPINGS = {"PilotfishLoadGuide": LoadGuide, "PilotfishApplyGuide": ApplyGuide}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PilotfishLoadGuide": "Load guide",
    "PilotfishApplyGuide": "Apply guide",
}
