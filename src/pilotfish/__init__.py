"""Pilotfish: classifier-free guidance in one pass."""
