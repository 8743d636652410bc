"""The recipe: what it writes is what is bundled, and its parts do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from pilotfish import bundled
from pilotfish.guides import Guide
from pilotfish.training.config import DistillConfig
from recipe.__main__ import Recipe
from recipe.ablations import ABLATIONS
from recipe.autoencoder import new_autoencoder, normalize_latents
from recipe.cards import write_cards
from recipe.finetunes import (
    STYLES,
    TEST_FINETUNES,
    TRAIN_FINETUNES,
    BaseName,
    finetune_folder,
)
from recipe.guides import (
    FIRST,
    REFRESH_RATIO,
    SIZES,
    TINY,
    TRAININGS,
    make_guide,
    trained_on,
)
from recipe.loop import train
from recipe.quantization import QuantizationResult, QuantizationStage, measure_quantization
from recipe.vocabulary import write_prompts
from tests import components
from tests.training.runs import small_guide


def test_help_lists_the_stages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(Recipe, args=["--help"], prog="python -m recipe", use_underscores=True)
    assert "train_finetunes" in capsys.readouterr().out


def test_the_bundled_prompts_are_those_of_the_recipe(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    for made in tmp_path.iterdir():
        assert made.read_bytes() == (bundled.FOLDER / "prompts" / made.name).read_bytes()


def test_the_bundled_cards_are_those_of_the_recipe(tmp_path: Path) -> None:
    cards = [p.relative_to(bundled.FOLDER) for p in bundled.FOLDER.rglob("README.md")]
    for card in cards:
        (tmp_path / card).parent.mkdir(parents=True, exist_ok=True)
    write_cards(tmp_path)
    assert len(cards) > 15
    for card in cards:
        assert (tmp_path / card).read_text() == (bundled.FOLDER / card).read_text()


def test_bundled_finetunes_are_where_the_recipe_saves_them() -> None:
    for base in STYLES:
        far = TEST_FINETUNES if base == "base" else ()
        for name in (*STYLES[base], *TRAIN_FINETUNES, *far):
            assert finetune_folder(bundled.FOLDER, name, base).is_dir()


@pytest.mark.parametrize("name", bundled.guide_names())
def test_a_bundled_guide_has_the_form_that_the_recipe_gives_it(name: str) -> None:
    guide = bundled.load_guide(name)
    base: BaseName = "sd3" if name in bundled.guide_names("sd3") else "base"
    ratio = REFRESH_RATIO.get(name.removeprefix("sd3-"), 0)
    form = TINY[base]["guide"] | {"refresh": True, "refresh_ratio": ratio}
    assert {key: guide.config[key] for key in form} == form


def test_the_settings_of_every_training_are_valid() -> None:
    trainings = [
        given | trained_on(bundled.FOLDER, base) | (form if name == "tiny" else {})
        for base, form in TINY.items()
        for name, one in TRAININGS.items()
        for given in one
    ]
    trainings += [FIRST | {"guide": guide} for guide in SIZES.values()]
    for settings in (*trainings, *ABLATIONS.values()):
        DistillConfig(output="unused", **settings)


def test_each_training_begins_with_the_mean_of_those_before(
    unet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Guide] = []
    started: list[Guide | None] = []

    def distil(settings: Any, folder: Path, *, bf16: bool, init_from: Path | None = None) -> Guide:
        started.append(None if init_from is None else Guide.from_pretrained(init_from))
        made.append(components.randomise(small_guide(unet), seed=len(made)))
        return made[-1]

    monkeypatch.setattr("recipe.guides.distil", distil)
    monkeypatch.setitem(TRAININGS, "tiny", ({}, {}, {}))
    make_guide("tiny", tmp_path, tmp_path, bf16=False)
    saved = Guide.from_pretrained(tmp_path / "guides" / "tiny")
    assert saved.refresh_ratio == REFRESH_RATIO["tiny"] > 0

    def mean(guides: list[Guide], name: str) -> torch.Tensor:
        return torch.stack([guide.state_dict()[name] for guide in guides]).mean(0)

    first, *later = started
    assert first is None
    for name, tensor in saved.state_dict().items():
        torch.testing.assert_close(tensor, mean(made, name).half().float())
        for i, begun in enumerate(later, 1):
            assert begun is not None
            torch.testing.assert_close(begun.state_dict()[name], mean(made[:i], name))


def test_normalised_latents_decode_as_before() -> None:
    torch.manual_seed(0)
    vae, images = new_autoencoder().eval(), torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        normalize_latents(vae, images)
        latents = vae.encode(images).latent_dist.mean
        after = vae.decode(latents).sample
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3


def test_an_interrupted_training_ends_in_the_same_weights(tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def run(folder: Path, stop: int | None = None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer, average = (torch.nn.Conv2d(3, 4, 3) for _ in range(2))
        layer.to(memory_format=torch.channels_last)
        modules: dict[str, Any] = {"layer": layer}

        def loss(step: int, generator: torch.Generator) -> torch.Tensor:
            if step == stop:
                raise Interrupted
            noise: torch.Tensor = layer(torch.randn(2, 3, 8, 8, generator=generator))
            return noise.square().mean()

        train(
            folder, modules, loss, steps=8, learning_rate=0.1, seed=1,
            averages={"layer": average}, save_every=3,
        )  # fmt: skip
        return [*layer.parameters(), *average.parameters()]

    whole = run(tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(tmp_path / "parts", stop=5)
    for one, other in zip(whole, run(tmp_path / "parts"), strict=True):
        assert torch.equal(one, other)


def test_guides_of_quantised_bases_are_measured_on_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unet, kinds = bundled.load_model("base").unet, []

    def distilled(config: DistillConfig) -> Guide:
        kinds.append(config.base_quantization)
        return components.randomise(small_guide(unet, "v_prediction"), seed=len(kinds))

    monkeypatch.setattr("recipe.quantization.distill", distilled)
    stage = QuantizationStage(("no", "fp8"), 1, 2, 1, 2, output=tmp_path / "found.json")
    measure_quantization(tmp_path, stage, bf16=False)
    assert kinds == ["no", "fp8"]
    plain, quantised = QuantizationResult.load(stage.output).bases.values()
    assert plain.trained_on_it == plain.on_plain == plain.plain_on_it
    assert len({plain.on_plain, *vars(quantised).values()}) == 4
    assert "| `fp8` | " in capsys.readouterr().out
