"""What the configuration of a saved guide may hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pilotfish.interface import GuideError


def check_config(config: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Refuse a configuration that no guide of this kind can have.

    Args:
        config: as it was read.
        known: the fields that the kind has.
        where: its folder or hub id, for the message.

    Raises:
        GuideError: an unknown field, or a value out of range.
    """
    unknown = [k for k in config if not k.startswith("_") and k not in known]
    if unknown:
        raise GuideError(f"the configuration in {where} has unknown fields: {unknown}")
    negative = [k for k, v in config.items() if isinstance(v, int | float) and v < 0]
    if negative:
        raise GuideError(
            f"the configuration in {where} has {negative[0]} {config[negative[0]]}; "
            "0 or more is needed"
        )
    given = config.get("timesteps")
    if given is not None and not _falling(given):
        raise GuideError(
            f"the configuration in {where} has timesteps {given}; falling whole numbers are needed"
        )
    trained_on = config.get("trained_on")
    if trained_on is not None and not _names_a_base(trained_on):
        raise GuideError(
            f"the configuration in {where} has trained_on {trained_on}; the name of a base "
            "and, where known, its revision are needed"
        )
    low, high = config.get("guidance_scale_range", (1.0, 1.0))
    if not 1 <= low <= high:
        raise GuideError(
            f"the configuration in {where} has guidance_scale_range [{low}, {high}]; "
            "1 <= low <= high is needed"
        )


def _falling(timesteps: Any) -> bool:
    """Whether these are whole numbers from high to low, none twice."""
    if not isinstance(timesteps, Sequence) or any(type(t) is not int for t in timesteps):
        return False
    return len(timesteps) > 0 and timesteps[-1] >= 0 and all(a > b for a, b in pairwise(timesteps))


def _names_a_base(fields: Any) -> bool:
    if not isinstance(fields, Mapping) or "name" not in fields:
        return False
    return set(fields) <= {"name", "revision"} and all(type(v) is str for v in fields.values())
