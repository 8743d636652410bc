"""A guider in files, and on releases of diffusers with other guiders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import ComponentSpec
from diffusers.guiders.guider_utils import BaseGuidance

from pilotfish import PilotfishGuidance
from pilotfish.modular.contract import check_guiders
from tests.modular.pipelines import build, guider

Saved = Callable[..., Path]


def test_its_configuration_is_saved_and_loaded(saved: Saved, tmp_path: Path) -> None:
    one = build("SDXL")
    made = guider(one, saved("SDXL"), refresh=(1, 2), stop=0.75)
    found = one.latents(made)
    made.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["guider_config.json"]
    loaded = PilotfishGuidance.from_pretrained(tmp_path)
    assert loaded.config.guide == str(saved("SDXL"))
    assert (loaded.refresh, loaded._stop, loaded._enabled) == ((1, 2), 0.75, True)
    assert torch.equal(one.latents(loaded), found)


def test_a_modular_index_names_it(saved: Saved, tmp_path: Path) -> None:
    """By the package alone, which is imported where somebody wants a guide."""
    guider(build("SDXL"), saved("SDXL")).save_pretrained(tmp_path / "guider")
    spec = ComponentSpec(
        "guider", PilotfishGuidance, pretrained_model_name_or_path=str(tmp_path),
        subfolder="guider", default_creation_method="from_pretrained",
    )  # fmt: skip
    one = build("SDXL")
    found = one.latents(spec.load())
    one.pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    index = json.loads((tmp_path / "modular_model_index.json").read_text())
    assert index["guider"][:2] == ["pilotfish", "PilotfishGuidance"]
    assert index["guider"][2]["type_hint"] == ["pilotfish", "PilotfishGuidance"]
    blocks = diffusers.StableDiffusionXLAutoBlocks()
    blocks.sub_blocks.pop("decode")
    one.pipe = blocks.init_pipeline(str(tmp_path))
    one.pipe.load_components()
    assert type(one.pipe.guider) is PilotfishGuidance
    assert torch.equal(one.latents(), found)


def test_guiders_that_have_moved_are_refused_in_a_sentence() -> None:
    check_guiders(BaseGuidance, diffusers.__version__)

    class Moved(BaseGuidance):
        def set_state(self, step: int, timestep: int) -> None: ...

    with pytest.raises(ImportError) as raised:
        check_guiders(Moved, "0.50.0")
    assert str(raised.value) == (
        "PilotfishGuidance is written for the guiders of diffusers 0.42, and in the installed "
        "0.50.0 their set_state takes (step, timestep); install diffusers 0.42, or attach the "
        "guide to a standard pipeline"
    )
    with pytest.raises(ImportError, match=r"in the installed 0\.34\.0 there are none;"):
        check_guiders(None, "0.34.0")


def test_the_package_is_imported_without_guiders() -> None:
    program = (
        "import sys, pilotfish\nassert 'PilotfishGuidance' in dir(pilotfish)\n"
        "print([n for n in ('torch', 'diffusers', 'pilotfish.modular') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
