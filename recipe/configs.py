"""The files of a saved pipeline, as they are bundled."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def tidy_configs(folder: Path) -> None:
    """Change the ``config.json`` of every part in a folder: no path of the machine that trained it,
    and float32 as the precision of text encoders. transformers loads in the precision that the
    configuration names, diffusers in float32."""
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def name_text_model(folder: Path) -> None:
    """Give the weights of a saved ``CLIPTextModel`` the names ``text_model.*``, as published models
    have them. Newer versions of transformers save shorter names, which 5.0 does not load."""
    path, prefix = folder / "model.safetensors", "text_model."
    named = {prefix + key.removeprefix(prefix): v for key, v in load_file(path).items()}
    save_file(named, path, {"format": "pt"})
