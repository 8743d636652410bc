"""Guides on diffusers pipelines: the user's call stays as it is, the second pass is gone."""

from pilotfish.pipelines.attach import Refreshed, attach, attached, detach
from pilotfish.pipelines.reference import Reference

__all__ = ["Reference", "Refreshed", "attach", "attached", "detach"]
