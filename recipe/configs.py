"""The configurations of a saved pipeline, as they are bundled."""

from __future__ import annotations

import json
from pathlib import Path


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
