"""Pilotfish: classifier-free guidance in one pass."""

from pilotfish import rivals  # so that Guide.from_pretrained knows them too
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
