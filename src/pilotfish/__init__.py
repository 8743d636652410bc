"""Pilotfish: classifier-free guidance in one pass."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pilotfish import rivals
    from pilotfish.contract import GuideError, GuideInputs, Injection
    from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide

__all__ = [
    "ExternalGuide",
    "FullGuide",
    "Guide",
    "GuideError",
    "GuideInputs",
    "Injection",
    "TinyGuide",
    "rivals",
]
__version__ = "0.1.0"

_OF_CONTRACT = {"GuideError", "GuideInputs", "Injection"}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first asked for: torch, diffusers and transformers
        take seconds, and the command line's help needs none of them (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        rivals = import_module("pilotfish.rivals")  # so that Guide.from_pretrained knows them too
        if name == "rivals":
            return rivals
        home = "contract" if name in _OF_CONTRACT else "guides"
        return getattr(import_module(f"pilotfish.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
