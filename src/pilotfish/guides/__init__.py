"""Guides: small networks that stand in for the second pass. One file a network, one contract."""

from pilotfish.guides.base import Guide
from pilotfish.guides.external import ExternalGuide
from pilotfish.guides.full import FullGuide
from pilotfish.guides.tiny import TinyGuide

__all__ = ["ExternalGuide", "FullGuide", "Guide", "TinyGuide"]
