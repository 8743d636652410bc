"""The public name of a denoiser's weights: a hub id, or the last part of a folder's path, never the
path itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

COMPONENTS = ("unet", "transformer", "transformer_2")
"""Folders that a denoiser may have in a pipeline's folder."""


@dataclass(frozen=True)
class Origin:
    """See the module.

    Attributes:
        name: a hub id, or the name of a folder.
        revision: the commit on the hub, where it is known.
        lora: whether a LoRA is loaded on top.
    """

    name: str
    revision: str | None = None
    lora: bool = False

    def __str__(self) -> str:
        at = f" at {self.revision[:7]}" if self.revision else ""
        return f"{self.name}{at}{' with a LoRA' if self.lora else ''}"

    @classmethod
    def of(cls, denoiser: Any) -> Origin | None:
        """Of a denoiser as diffusers has loaded it; None where it was made in memory."""
        where = denoiser.config.get("_name_or_path")
        if not where:
            return None
        lora = bool(getattr(denoiser, "peft_config", None))
        parts = Path(where).parts
        for i, part in enumerate(parts[:-2]):
            # the hub's cache: models--owner--name/snapshots/<commit>/unet
            if part.startswith("models--") and parts[i + 1] == "snapshots":
                return cls(part.removeprefix("models--").replace("--", "/"), parts[i + 2], lora)
        if Path(where).exists() and Path(where).resolve().name in COMPONENTS:
            return cls(Path(where).resolve().parent.name, None, lora)
        return cls(public_name(where), None, lora)

    @classmethod
    def saved(cls, fields: Mapping[str, Any] | None) -> Origin | None:
        """What :meth:`plain` gave."""
        return None if fields is None else cls(fields["name"], fields.get("revision"))

    def plain(self) -> dict[str, str]:
        """For a configuration."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {"name": self.name, **revision}

    def same_as(self, other: Origin) -> bool:
        """Whether both name the same weights, as far as is known."""
        revisions = {self.revision, other.revision} - {None}
        return self.name == other.name and len(revisions) < 2 and self.lora == other.lora


def public_name(where: str | Path) -> str:
    """A hub id as it is; of a path its last part, so that no folder of a machine is published."""
    text = str(where)
    if Path(text).exists():
        return Path(text).resolve().name
    # a hub id has one owner at most
    if text.startswith(".") or text.count("/") > 1:
        return PurePosixPath(text).name
    return portable_path(text)


def portable_path(where: str | Path) -> str:
    """Of an absolute path its last part; a relative path and a hub id as they are."""
    text = str(where)
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(text).is_absolute() or text.startswith("~"):
            return kind(text).name
    return text
