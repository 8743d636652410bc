from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pilotfish.data.images import from_pixels, to_pixels
from pilotfish.evaluation.clip import FrechetFeatures, Scorer
from pilotfish.evaluation.metrics import ClipScore, InceptionFID


def test_features_have_length_one(scorer: Scorer, names: list[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, 3, 16, 16, generator=generator) * 2 - 1
    for features in (scorer.images(images), scorer.texts(names)):
        assert features.shape[1] == 12
        assert torch.allclose(features.norm(dim=1), torch.ones(len(features)))


def test_features_do_not_depend_on_the_company(scorer: Scorer, names: list[str]) -> None:
    images = torch.linspace(-1, 1, 5 * 3 * 16 * 16).reshape(5, 3, 16, 16).roll(7, -1)
    assert torch.allclose(scorer.images(images)[2:3], scorer.images(images[2:3]), atol=1e-5)
    assert torch.allclose(scorer.texts(names)[6:], scorer.texts(["cat"]), atol=1e-5)


def test_tensors_are_prepared_as_the_processor_prepares_images(clip: Any) -> None:
    pixels = torch.randint(0, 256, (3, 16, 16), generator=torch.Generator().manual_seed(1))
    pixels = pixels.to(torch.uint8)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    theirs = clip[1].image_processor(image, return_tensors="pt").pixel_values
    ours = Scorer(*clip).prepare(from_pixels(pixels[None]))
    assert torch.allclose(ours, theirs, atol=1e-4)


def test_features_are_those_of_transformers(clip: Any, scorer: Scorer) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    inputs = clip[1].tokenizer(
        ["cat", "a"], padding="max_length", max_length=8, return_tensors="pt"
    )
    with torch.no_grad():
        out = clip[0](pixel_values=scorer.prepare(images), input_ids=inputs.input_ids)
    assert torch.allclose(out.image_embeds, scorer.images(images), atol=1e-5)
    assert torch.allclose(out.text_embeds, scorer.texts(["cat", "a"]), atol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (32, 32), (20, 40), (40, 20)])
def test_every_size_is_brought_to_the_scorers(scorer: Scorer, shape: tuple[int, int]) -> None:
    for stretched in (True, False):
        scorer.stretched = stretched
        assert scorer.prepare(torch.zeros(1, 3, *shape)).shape == (1, 3, 16, 16)


def test_an_image_that_is_not_square_keeps_its_middle(scorer: Scorer) -> None:
    scorer.stretched = False
    image = torch.full((1, 3, 16, 48), -1.0)
    image[..., 16:32] = 1.0
    assert (scorer.prepare(image) == 2.0).all()  # (1 - 0.5) / 0.25


def test_frechet_features_know_their_width(scorer: Scorer) -> None:
    features = FrechetFeatures(scorer)
    made = features(torch.zeros(2, 3, 16, 16))
    assert made.shape == (2, features.num_features)
    assert not list(features.parameters())


def test_a_scorer_is_read_from_a_folder(clip: Any, scorer: Scorer, tmp_path: Path) -> None:
    for part in clip:
        part.save_pretrained(tmp_path)
    again = Scorer.from_folder(tmp_path)
    assert torch.allclose(again.texts(["cat"]), scorer.texts(["cat"]), atol=1e-5)


def test_a_missing_scorer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no CLIP in .*gone: there is no such folder"):
        Scorer.from_folder(tmp_path / "gone")
    with pytest.raises(ValueError, match="no CLIP could be read from"):
        Scorer.from_folder(tmp_path)


def test_clip_score_is_the_mean_cosine_times_100(clip: Any, scorer: Scorer) -> None:
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    score = ClipScore(scorer)
    score.update(images[:2], ["cat", "a"])
    score.update(images[2:], ["b"])
    inputs = clip[1](
        text=["cat", "a", "b"], images=[to_pil_image(x) for x in images],
        padding="max_length", max_length=8, return_tensors="pt",
    )  # fmt: skip
    with torch.no_grad():
        logits = clip[0](**inputs).logits_per_image / clip[0].logit_scale.exp()
    expected = 100 * max(0.0, float(logits.diag().mean()))
    assert score.compute() == pytest.approx(expected, abs=0.5)


def to_pil_image(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(to_pixels(image[None])[0].permute(1, 2, 0).numpy())


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_inception_weights_are_local_and_no_pickle(tmp_path: Path) -> None:
    reference = torch.zeros(2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"no Inception weights in .*gone"):
        InceptionFID(tmp_path / "gone.pth", reference)
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    with pytest.raises(ValueError, match="holds no Inception weights"):
        InceptionFID(tmp_path / "trap.pth", reference)
    assert not (tmp_path / "sprung").exists()
