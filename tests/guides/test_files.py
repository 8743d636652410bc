"""The files of a guide: what is saved, and what is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from pilotfish.backbones import Backbone
from pilotfish.guides import FullGuide, Guide, TinyGuide
from pilotfish.interface import GuideError
from tests import components

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def guide(unet: UNet2DConditionModel) -> TinyGuide:
    torch.manual_seed(3)
    return components.randomise(TinyGuide.for_denoiser(unet, "epsilon", rank=4))


@pytest.fixture
def folder(guide: TinyGuide, tmp_path: Path) -> Path:
    """A guide as it is saved."""
    guide.save_pretrained(tmp_path / "guide")
    return tmp_path / "guide"


def refusal(folder: Path, guide_class: type[Guide] = Guide) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(GuideError) as caught:
        guide_class.from_pretrained(folder)
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert len(sentence.splitlines()) == 1
    assert "Traceback" not in sentence
    return sentence


def test_saved_and_loaded_a_guide_is_the_same(
    trained: Guide, tmp_path: Path, pipe: Any, draw: Callable[..., torch.Tensor]
) -> None:
    trained.save_pretrained(tmp_path)
    loaded = Guide.from_pretrained(tmp_path)
    assert type(loaded) is type(trained)
    assert not loaded.training
    assert set(loaded.state_dict()) == set(trained.state_dict())
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in trained.state_dict().items())
    assert loaded.settings() == trained.settings()
    assert loaded.guidance_scale_range == trained.guidance_scale_range
    with trained.attached(pipe):
        expected = draw(pipe)
    # a file lays weights at unaligned addresses, from which some processors' kernels sum in
    # another order; a copy in memory of its own is the same to the last bit
    with deepcopy(loaded).attached(pipe):
        assert torch.equal(draw(pipe), expected)
    with loaded.attached(pipe):
        torch.testing.assert_close(draw(pipe), expected, rtol=1e-4, atol=1e-3)


def test_every_kind_may_recommend_refreshes(trained: Guide, tmp_path: Path) -> None:
    trained.register_to_config(refresh_ratio=0.12)
    trained.save_pretrained(tmp_path)
    assert Guide.from_pretrained(tmp_path).refresh_ratio == 0.12


def test_the_folder_has_the_format_of_diffusers(trained: Guide, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", WEIGHTS}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == type(trained).__name__
    assert config["signature"]["prediction_type"] == "epsilon"
    assert (config["signature"]["family"], config["signature"]["version"]) == ("unet", 1)
    assert config["pilotfish_version"]
    assert len(config["guidance_scale_range"]) == 2


def test_each_class_loads_its_own_type_only(trained: Guide, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    assert type(type(trained).from_pretrained(tmp_path)) is type(trained)
    other = TinyGuide if isinstance(trained, FullGuide) else FullGuide
    sentence = refusal(tmp_path, other)
    assert other.__name__ in sentence
    assert type(trained).__name__ in sentence


def test_a_subfolder_and_a_variant_are_found(guide: Guide, tmp_path: Path) -> None:
    guide.save_pretrained(tmp_path / "inner", variant="fp16")
    loaded = Guide.from_pretrained(tmp_path, subfolder="inner", variant="fp16")
    assert set(loaded.state_dict()) == set(guide.state_dict())


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"colour": "red"}, "unknown fields: ['colour']"),
        ({"denoiser": {}}, "Pilotfish 0.1 saved it, train it again"),
        ({"_class_name": "UNet2DConditionModel"}, "UNet2DConditionModel"),
        ({"guidance_scale_range": [0.5, 8.0]}, "1 <= low <= high"),
        ({"guidance_scale_range": [4.0, 2.0]}, "1 <= low <= high"),
        ({"guidance_scale_range": [float("nan"), 8.0]}, "1 <= low <= high"),
        ({"guidance_scale_range": [1.0, 2.0, 3.0]}, "1 <= low <= high"),
        ({"guidance_scale_range": 7}, "1 <= low <= high"),
        ({"guidance_scale_range": "wide"}, "1 <= low <= high"),
        ({"guidance_scale_range": ["a", "b"]}, ""),
        ({"times": [0.2, 0.9]}, "falling numbers in [0, 1]"),
        ({"times": [999, 499]}, "falling numbers in [0, 1]"),
        ({"times": []}, "falling numbers in [0, 1]"),
        ({"rank": -3}, "rank -3"),
        ({"signature": {}}, "a family and a version"),
        ({"signature": "unet"}, "a family and a version"),
    ],
    ids=str,
)
def test_a_configuration_that_no_guide_can_have_is_refused(
    folder: Path, edit_config: Callable[..., None], fields: dict[str, Any], reason: str
) -> None:
    edit_config(folder, **fields)
    assert reason in refusal(folder)


def test_a_configuration_that_is_no_json_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:40])
    refusal(folder)


@pytest.mark.parametrize("kept", [slice(None, -100), slice(None, 20)])
def test_truncated_weights_are_refused(folder: Path, kept: slice) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[kept])
    refusal(folder)


def test_a_changed_bit_is_refused(folder: Path) -> None:
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "checksum mismatch" in refusal(folder)


def test_missing_weights_are_refused(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    refusal(folder)


def test_a_missing_or_empty_folder_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "nowhere")
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


def test_the_signature_is_the_same_after_json(folder: Path, unet: Any) -> None:
    loaded, backbone = Guide.from_pretrained(folder), Backbone.of(unet)
    loaded.check(backbone.signature("epsilon"))
    with pytest.raises(GuideError, match="prediction_type: guide epsilon, denoiser v_prediction"):
        loaded.check(backbone.signature("v_prediction"))


def test_tuples_and_lists_are_equal_in_a_signature(guide: Guide) -> None:
    def tuples(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(map(tuples, value))
        return {k: tuples(v) for k, v in value.items()} if isinstance(value, dict) else value

    signature = tuples(dict(guide.config.signature))
    assert isinstance(signature["layers"], tuple)
    guide.check(signature)


def test_a_difference_in_a_list_is_named(guide: Guide) -> None:
    signature = dict(guide.config.signature)
    layers = [list(layer) for layer in signature["layers"]]
    layers[1][1] = 99
    with pytest.raises(GuideError, match=r"layers: guide \[.*, 16\] \(entry 2 of"):
        guide.check(signature | {"layers": layers})
    with pytest.raises(GuideError, match="denoiser nothing more"):
        guide.check(signature | {"layers": signature["layers"][:1]})
