"""What every guide keeps: its files, its fingerprint, its refusals."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pilotfish.backbones import fingerprint
from pilotfish.guides import FullGuide, Guide, TinyGuide
from pilotfish.interface import GuideError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(trained: Guide, tmp_path: Path) -> Path:
    """A guide as it is saved."""
    trained.save_pretrained(tmp_path / "guide")
    return tmp_path / "guide"


def refusal(folder: Path, kind: type[Guide] = Guide) -> str:
    """The one plain sentence with which a folder is refused."""
    with pytest.raises(GuideError) as caught:
        kind.from_pretrained(folder)
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert len(sentence.splitlines()) == 1
    assert "Traceback" not in sentence
    return sentence


def test_saved_and_loaded_it_is_the_same(
    trained: Guide, folder: Path, pipe: Any, draw: Callable[..., torch.Tensor]
) -> None:
    again = Guide.from_pretrained(folder)
    assert type(again) is type(trained)
    assert not again.training
    assert set(again.state_dict()) == set(trained.state_dict())
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in trained.state_dict().items())
    assert again.guidance_scale_range == trained.guidance_scale_range
    with trained.attached(pipe):
        expected = draw(pipe)
    # a file lays weights at unaligned addresses, from which some processors' kernels sum in
    # another order; a copy in memory of its own is the same to the last bit
    with deepcopy(again).attached(pipe):
        assert torch.equal(draw(pipe), expected)
    with again.attached(pipe):
        torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-3)


def test_the_folder_is_diffusers_own_form(trained: Guide, folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} >= {"config.json", WEIGHTS}
    config = json.loads((folder / "config.json").read_text())
    assert config["_class_name"] == type(trained).__name__
    assert config["denoiser"]["prediction_type"] == "epsilon"
    assert config["denoiser"]["family"] == "UNet2DConditionModel"
    assert config["pilotfish_version"]
    assert len(config["guidance_scale_range"]) == 2


def test_a_subfolder_and_a_variant_are_found(trained: Guide, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "inner", variant="fp16")
    again = Guide.from_pretrained(tmp_path, subfolder="inner", variant="fp16")
    assert set(again.state_dict()) == set(trained.state_dict())


def test_an_own_class_loads_its_own_kind_only(trained: Guide, folder: Path) -> None:
    assert type(type(trained).from_pretrained(folder)) is type(trained)
    other = TinyGuide if isinstance(trained, FullGuide) else FullGuide
    sentence = refusal(folder, other)
    assert other.__name__ in sentence
    assert type(trained).__name__ in sentence


def test_an_unknown_field_is_refused(folder: Path, edit_config: Callable[..., None]) -> None:
    edit_config(folder, colour="red")
    assert "unknown fields: ['colour']" in refusal(folder)


def test_an_unknown_kind_is_refused(folder: Path, edit_config: Callable[..., None]) -> None:
    edit_config(folder, _class_name="UNet2DConditionModel")
    assert "UNet2DConditionModel" in refusal(folder)


@pytest.mark.parametrize("bad", [[0.5, 8.0], [4.0, 2.0], [float("nan"), 8.0]])
def test_a_range_that_is_none_is_refused(
    folder: Path, edit_config: Callable[..., None], bad: list[float]
) -> None:
    edit_config(folder, guidance_scale_range=bad)
    assert "1 <= low <= high" in refusal(folder)


@pytest.mark.parametrize("bad", [7, "wide", [1.0], ["a", "b"], [1.0, 2.0, 3.0]])
def test_a_range_of_another_kind_is_refused(
    folder: Path, edit_config: Callable[..., None], bad: Any
) -> None:
    edit_config(folder, guidance_scale_range=bad)
    refusal(folder)


def test_a_negative_size_is_refused(tmp_path: Path, unet: Any, edit_config: Any) -> None:
    TinyGuide.for_denoiser(unet, "epsilon").save_pretrained(tmp_path)
    edit_config(tmp_path, rank=-3)
    assert "rank -3" in refusal(tmp_path)


def test_a_missing_fingerprint_is_refused(folder: Path, edit_config: Callable[..., None]) -> None:
    edit_config(folder, denoiser={})
    assert "is missing" in refusal(folder)


def test_a_configuration_that_is_no_json_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:40])
    refusal(folder)


def test_truncated_weights_are_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    refusal(folder)


def test_a_truncated_header_is_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:20])
    refusal(folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refusal(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path)


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert f"missing tensors, first {name}" in refusal(folder)


def test_a_tensor_too_many_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS) | {"stranger": torch.zeros(2)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert "unexpected tensors, first stranger" in refusal(folder)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name] = torch.zeros(3, 3, 3)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    tensors = load_file(folder / WEIGHTS)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    assert f"not finite in {name}" in refusal(folder)


class Bomb:
    """What a pickle can do."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_is_refused_and_never_opened(folder: Path, tmp_path: Path) -> None:
    (folder / WEIGHTS).unlink()
    marker = tmp_path / "exploded"
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    refusal(folder)
    with pytest.raises(GuideError):
        Guide.from_pretrained(folder, use_safetensors=False)
    assert not marker.exists()


def test_the_fingerprint_survives_json(trained: Guide, folder: Path, unet: Any) -> None:
    again = Guide.from_pretrained(folder)
    again.check(fingerprint(unet, "epsilon"))
    with pytest.raises(GuideError, match="prediction_type: guide epsilon, denoiser v_prediction"):
        again.check(fingerprint(unet, "v_prediction"))


def test_a_fingerprint_with_more_to_say_is_refused(trained: Guide, unet: Any) -> None:
    with pytest.raises(GuideError, match="depth: guide None, denoiser 3"):
        trained.check(fingerprint(unet, "epsilon") | {"depth": 3})
