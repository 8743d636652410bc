"""Names on the command line -> pipelines, guides, prompts: embedded ones or the user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pilotfish import embedded
from pilotfish.evaluate.features import Judge
from pilotfish.evaluate.spread import device
from pilotfish.guides import Guide
from pilotfish.pipelines import load_pipeline


def host(name: str) -> Any:
    """An embedded host (base, fluent, twemoji, emojione) or a pipeline's folder or hub id."""
    if name in embedded.HOSTS:
        return embedded.load_host(name)
    return load_pipeline(name)


def guide(name: str) -> Guide:
    """The embedded guide (tiny) or a guide's folder or hub id."""
    if name in embedded.guide_names() and not Path(name).exists():
        return embedded.load_guide(name)
    return Guide.from_pretrained(name)


def measured(name: str) -> Any:
    """A host where this process measures it."""
    return host(name).to(device())


def judge(folder: str | None) -> Judge:
    """The embedded judge or one of the user's, there as well."""
    found = Judge.from_folder(folder) if folder else Judge.embedded()
    found.model.to(device())
    return found
