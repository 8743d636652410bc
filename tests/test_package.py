"""The package itself: quick to begin, and everything in it when it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pilotfish

HEAVY = "torch", "diffusers", "transformers"


def loaded_by(program: str) -> set[str]:
    """Which of the heavy libraries a program has loaded in the end."""
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nimport sys\nprint('|', *sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(HEAVY) & set(done.stdout.rpartition("|")[2].split())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["fly"]])
def test_help_needs_no_heavy_library(arguments: list[str]) -> None:
    assert not loaded_by(f"from pilotfish.cli import main\nmain({arguments})")


def test_every_public_name_is_there() -> None:
    for name in pilotfish.__all__:
        assert getattr(pilotfish, name) is not None
        assert name in dir(pilotfish)
    with pytest.raises(AttributeError, match="no attribute 'Giude'"):
        pilotfish.Giude  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    "door",
    [
        "from pilotfish import Guide",
        "from pilotfish.bundled import Guide",
        "from pilotfish.cli import command; command('push'); from pilotfish.guides import Guide",
    ],
)
def test_every_kind_of_guide_can_be_read_by_whatever_door(door: str) -> None:
    program = f"{door}; assert 'ExternalGuide' in Guide.kinds, Guide.kinds"
    assert loaded_by(program) == set(HEAVY)
