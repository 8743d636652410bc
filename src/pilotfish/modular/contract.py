"""The guiders of diffusers that :class:`~pilotfish.modular.PilotfishGuidance` is written for.

Diffusers calls them experimental. A method that has other parameters would fail in the middle of a
call, or worse, would not: so they are compared once, on import.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

WRITTEN_FOR = "0.42"
"""Version of diffusers."""

PARAMETERS = {
    "__init__": ("start", "stop", "enabled"),
    "set_state": ("step", "num_inference_steps", "timestep"),
    "prepare_models": ("denoiser",),
    "cleanup_models": ("denoiser",),
    "prepare_inputs": ("data",),
    "prepare_inputs_from_block_state": ("data", "input_fields"),
    "_prepare_batch": ("data", "tuple_index", "identifier"),
    "_prepare_batch_from_block_state": ("input_fields", "data", "tuple_index", "identifier"),
    "__call__": ("data",),
}
"""Of the methods of ``BaseGuidance`` that pipelines call, or that are called here."""


def check_guiders(base: Any, version: str) -> None:
    """Refuse guiders with another interface.

    Args:
        base: ``BaseGuidance`` of diffusers; None where there is none.
        version: of diffusers.

    Raises:
        ImportError: naming both versions and the first method that differs.
    """
    if base is None:
        raise _moved("there are none", version)
    for name, expected in PARAMETERS.items():
        method = getattr(base, name, None)
        if method is None:
            raise _moved(f"they have no {name}", version)
        found = tuple(p for p in signature(method).parameters if p != "self")
        if found != expected:
            raise _moved(f"their {name} takes ({', '.join(found)})", version)


def _moved(how: str, version: str) -> ImportError:
    return ImportError(
        f"PilotfishGuidance is written for the guiders of diffusers {WRITTEN_FOR}, and in the "
        f"installed {version} {how}; install diffusers {WRITTEN_FOR}, or attach the guide to a "
        "standard pipeline"
    )
