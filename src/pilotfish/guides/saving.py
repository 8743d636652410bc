"""The files of a saved guide, and what its configuration may hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import try_to_load_from_cache

from pilotfish.guidances import Guidance
from pilotfish.interface import GuideError

_HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


def hub_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` that say where to look, and how."""
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


def check_config(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse a configuration that no guide of its type can have.

    Args:
        config: as it was read.
        known: the fields that the type has.
        where: its folder or hub id, for the message.

    Raises:
        GuideError: an unknown field, a missing signature, or a value out of range.
    """

    def need(holds: bool, name: str, value: Any, what: str) -> None:
        if not holds:
            raise GuideError(f"the configuration in {where} has {name} {value}; {what} needed")

    unknown = [k for k in config if not k.startswith("_") and k not in known]
    if unknown:
        hint = "; Pilotfish 0.1 saved it, train it again" if "denoiser" in unknown else ""
        raise GuideError(f"the configuration in {where} has unknown fields: {unknown}{hint}")
    for name, value in config.items():
        negative = isinstance(value, int | float) and value < 0
        need(not negative, name, value, "0 or more is")
    signature = config.get("signature")
    has_family = isinstance(signature, Mapping) and {"family", "version"} <= set(signature)
    need(has_family, "signature", signature, "a family and a version are")
    times = config.get("times")
    need(times is None or _falling(times), "times", times, "falling numbers in [0, 1] are")
    ratio = config.get("refresh_ratio", 0.0)
    need(isinstance(ratio, int | float) and ratio <= 1, "refresh_ratio", ratio, "0 to 1 is")
    try:
        Guidance.saved(config.get("teacher"))
    except (ValueError, TypeError) as error:
        raise GuideError(f"the configuration in {where} has a wrong teacher: {error}") from error
    base = config.get("trained_on")
    need(
        base is None or _names_a_base(base), "trained_on", base,
        "the name of a base and, where known, its revision are",
    )  # fmt: skip
    scales = config.get("guidance_scale_range", (1.0, 1.0))
    pair = isinstance(scales, Sequence) and len(scales) == 2
    need(
        pair and 1 <= scales[0] <= scales[1], "guidance_scale_range", scales, "1 <= low <= high is"
    )


def _falling(times: Any) -> bool:
    """Whether these are numbers in [0, 1] from high to low, none twice."""
    if not isinstance(times, Sequence) or any(type(t) not in (int, float) for t in times):
        return False
    inside = len(times) > 0 and times[-1] >= 0 and times[0] <= 1
    return inside and all(a > b for a, b in pairwise(times))


def _names_a_base(fields: Any) -> bool:
    if not isinstance(fields, Mapping) or "name" not in fields:
        return False
    return set(fields) <= {"name", "revision"} and all(type(v) is str for v in fields.values())
