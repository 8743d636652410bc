"""Hosts: the pipelines that a guide is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pilotfish import bundled


@dataclass(frozen=True)
class Host:
    """Where a host comes from: loaded when its turn comes, let go after it.

    Attributes:
        load: gives the pipeline.
        pictures: folder of real pictures in its style; None: no Fréchet distance.
    """

    load: Callable[[], Any]
    pictures: Path | None = None


def embedded_hosts() -> dict[str, Host]:
    """The embedded base and its fine-tunes."""
    return {
        name: Host(partial(bundled.load_model, name), bundled.images(name))
        for name in bundled.MODELS
    }
