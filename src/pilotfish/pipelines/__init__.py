"""Guides on diffusers pipelines: the user's call stays as it is, the second pass is gone."""

from pilotfish.pipelines.attach import attach, attached, detach

__all__ = ["attach", "attached", "detach"]


def check(guide, pipe):  # type: ignore[no-untyped-def]
    """OLD NAME."""
    from pilotfish.pipelines.attach import check as checked

    return checked(guide, pipe).denoiser
