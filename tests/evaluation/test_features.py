from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pilotfish.data.images import from_pixels
from pilotfish.evaluation.features import FrechetFeatures, Judge


def test_features_have_length_one(judge: Judge, names: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1
    for features in (judge.images(images), judge.texts(names)):
        assert features.shape[1] == 12
        assert torch.allclose(features.norm(dim=1), torch.ones(len(features)))


def test_features_do_not_depend_on_the_company(judge: Judge, names: list[str]) -> None:
    images = torch.linspace(-1, 1, 5 * 3 * 16 * 16).reshape(5, 3, 16, 16).roll(7, -1)
    assert torch.allclose(judge.images(images)[2:3], judge.images(images[2:3]), atol=1e-5)
    assert torch.allclose(judge.texts(names)[6:], judge.texts(["cat"]), atol=1e-5)


def test_tensors_are_prepared_as_the_processor_prepares_pictures(clip: Any) -> None:
    pixels = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    theirs = clip[1].image_processor(picture, return_tensors="pt").pixel_values
    ours = Judge(*clip).prepare(from_pixels(pixels[None]))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_features_are_those_of_transformers(clip: Any, judge: Judge) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    inputs = clip[1].tokenizer(
        ["cat", "a"], padding="max_length", max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        out = clip[0](pixel_values=judge.prepare(images), input_ids=inputs.input_ids)
    assert torch.allclose(out.image_embeds, judge.images(images), atol=1e-5)
    assert torch.allclose(out.text_embeds, judge.texts(["cat", "a"]), atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (20, 40), (40, 20)])
def test_every_size_is_brought_to_the_judges(judge: Judge, shape: tuple[int, int]) -> None:
    for whole in (True, False):
        judge.whole = whole
        assert judge.prepare(torch.zeros(1, 3, *shape)).shape == (1, 3, 16, 16)


def test_a_picture_that_is_not_square_keeps_its_middle(judge: Judge) -> None:
    judge.whole = False
    image = torch.full((1, 3, 16, 48), -1.0)
    image[..., 16:32] = 1.0
    assert (judge.prepare(image) == 2.0).all()  # (1 - 0.5) / 0.25


def test_frechet_features_know_their_width(judge: Judge) -> None:
    features = FrechetFeatures(judge)
    made = features(torch.zeros(2, 3, 16, 16))
    assert made.shape == (2, features.num_features)
    assert not list(features.parameters())


def test_a_judge_is_read_from_a_folder(clip: Any, judge: Judge, tmp_path: Path) -> None:
    for part in clip:
        part.save_pretrained(tmp_path)
    again = Judge.from_folder(tmp_path)
    assert torch.allclose(again.texts(["cat"]), judge.texts(["cat"]), atol=1e-5)


def test_a_missing_judge_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no judge in .*gone: there is no such folder"):
        Judge.from_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match="no judge could be read from"):
        Judge.from_folder(tmp_path)
