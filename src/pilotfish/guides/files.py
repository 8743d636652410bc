"""Where the files of a saved guide lie."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import try_to_load_from_cache

_HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``from_pretrained`` that say where to look, and how."""
    return {k: arguments[k] for k in _HUB if k in arguments}


def saved_in(name_or_path: Any, config_name: str, arguments: Mapping[str, Any]) -> Path:
    """The folder of a guide that was found: the one that was given, or that of a hub id in the
    cache.

    Raises:
        OSError: it is in neither.
    """
    folder, inner = Path(name_or_path), arguments.get("subfolder") or "."
    if folder.is_dir():
        below = folder / inner
        return below if (below / config_name).is_file() else folder
    where = {k: arguments.get(k) for k in ("cache_dir", "revision")}
    found = try_to_load_from_cache(
        f"{name_or_path}", (Path(inner) / config_name).as_posix(), **where
    )
    if not isinstance(found, str):
        raise OSError(f"{name_or_path} is not in the cache")
    return Path(found).parent


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files of weights in a folder: one, or several where they are large."""
    stem = SAFETENSORS_WEIGHTS_NAME.removesuffix(".safetensors")
    stem = f"{stem}.{variant}" if variant else stem
    whole = folder / f"{stem}.safetensors"
    return [whole] if whole.is_file() else sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
