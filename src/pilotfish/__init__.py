"""Pilotfish: classifier-free guidance in one pass."""

from pilotfish.contract import GuideError, GuideInputs, Injection
from pilotfish.guides import FullGuide, Guide, TinyGuide

__all__ = ["FullGuide", "Guide", "GuideError", "GuideInputs", "Injection", "TinyGuide"]
__version__ = "0.1.0"
