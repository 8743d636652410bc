"""The rebuild changes no figure: see :mod:`tests.net.measure`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.net import measure

pytestmark = pytest.mark.slow
RECORD = json.loads((measure.HERE / "record.json").read_text())


@pytest.mark.parametrize("name", measure.MODELS)
def test_the_guidance_error_of_the_bundled_guide_is_as_recorded(name: str) -> None:
    recorded = RECORD["guidance_error"][name]
    assert measure.errors(name) == pytest.approx(recorded, rel=1e-5)


def test_images_are_as_recorded() -> None:
    """Bit for bit on the machine of the record; elsewhere to one level of 255."""
    recorded = np.load(measure.HERE / "images.npz")
    for name, pixels in measure.images().items():
        far = np.abs(pixels.astype(int) - recorded[name].astype(int)).max()
        assert far <= 1, name
