"""Pilotfish: classifier-free guidance in one pass."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide
    from pilotfish.interface import GuideError, GuideInputs, GuideOutput
    from pilotfish.modular import PilotfishGuidance as PilotfishGuidance
    from pilotfish.pipelines import detach

# without PilotfishGuidance: a star import works on releases of diffusers with other guiders, too
__all__ = [
    "ExternalGuide",
    "FullGuide",
    "Guide",
    "GuideError",
    "GuideInputs",
    "GuideOutput",
    "TinyGuide",
    "detach",
]
__version__ = "0.2.0"

_HOMES = {
    "GuideError": "interface", "GuideInputs": "interface", "GuideOutput": "interface",
    "detach": "pipelines", "PilotfishGuidance": "modular",
}  # fmt: skip

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first asked for: torch, diffusers and transformers
        take seconds, and the command line's help needs none of them (PEP 562)."""
        if name not in __all__ and name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"pilotfish.{_HOMES.get(name, 'guides')}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_HOMES})
