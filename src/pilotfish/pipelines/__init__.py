"""Guides on diffusers pipelines: the user's call stays as it is, the second pass is gone."""

from pilotfish.pipelines.attach import Refreshed, attach, attached, detach

__all__ = ["Refreshed", "attach", "attached", "detach"]
