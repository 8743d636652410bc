"""Guides: networks that take the place of the second pass. One file a network, one interface."""

from pilotfish.guides.base import Guide
from pilotfish.guides.external import ExternalGuide
from pilotfish.guides.full import FullGuide
from pilotfish.guides.tiny import TinyGuide

__all__ = ["ExternalGuide", "FullGuide", "Guide", "TinyGuide"]
