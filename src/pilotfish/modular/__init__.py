"""A guide in pipelines of Modular Diffusers, as their guider."""

from pilotfish.modular.guider import PilotfishGuidance

__all__ = ["PilotfishGuidance"]
