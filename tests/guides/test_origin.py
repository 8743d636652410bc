"""The name of the base that a guide was trained on, and what is logged on another."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import SD3Transformer2DModel, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

from pilotfish import cli
from pilotfish.backbones import Backbone, Origin, portable_path, public_name
from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideError
from tests import components
from tests.cli.conftest import SHORT

COMMIT = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
Make = Callable[..., TinyGuide]


@pytest.fixture
def make(unet: UNet2DConditionModel) -> Make:
    """A function that makes a guide which remembers a base."""

    def guide(name: str | None = None, **more: str) -> TinyGuide:
        trained_on = None if name is None else {"name": name, **more}
        return TinyGuide.for_denoiser(unet, "epsilon", trained_on=trained_on)

    return guide


@pytest.fixture
def folder(pipe: StableDiffusionPipeline, tmp_path: Path) -> Path:
    """A base's folder."""
    pipe.save_pretrained(tmp_path / "my-base")
    return tmp_path / "my-base"


def load(folder: Path, **more: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, **more)


def test_a_folder_is_known_by_its_name(folder: Path) -> None:
    assert Origin.of(load(folder).unet) == Origin("my-base")
    alone = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert Origin.of(alone) == Origin("my-base")


def test_a_denoiser_made_in_memory_has_no_origin(unet: UNet2DConditionModel) -> None:
    assert Origin.of(unet) is None


def test_the_cache_of_the_hub_holds_id_and_commit(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "hub" / "models--some-one--sd.x" / "snapshots" / COMMIT
    shutil.copytree(folder, place)
    assert Origin.of(load(place).unet) == Origin("some-one/sd.x", COMMIT)


def test_a_lora_is_another_denoiser(folder: Path) -> None:
    unet = load(folder).unet
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]))
    assert Origin.of(unet) == Origin("my-base", lora=True)
    assert not Origin("my-base").same_as(Origin("my-base", lora=True))


def test_a_transformer_is_known_by_its_pipelines_folder(tmp_path: Path) -> None:
    components.sd3_transformer().save_pretrained(tmp_path / "my-base" / "transformer")
    loaded = SD3Transformer2DModel.from_pretrained(tmp_path / "my-base" / "transformer")
    assert Origin.of(loaded) == Origin("my-base")


@pytest.mark.parametrize(
    ("where", "name", "portable"),
    [
        ("owner/name", "owner/name", "owner/name"),
        ("/home/ann/models/base", "base", "base"),
        ("~ann/models/base", "base", "base"),
        ("C:\\models\\base", "base", "base"),
        ("../models/base", "base", "../models/base"),
        ("a/b/base", "base", "a/b/base"),
        ("4.0", "4.0", "4.0"),
    ],
)
def test_no_folder_of_a_machine_is_saved(where: str, name: str, portable: str) -> None:
    assert public_name(where) == name
    assert portable_path(where) == portable


def test_a_saved_guide_names_its_base_and_no_path(make: Make, tmp_path: Path) -> None:
    make("owner/base", revision=COMMIT).save_pretrained(tmp_path / "one")
    again = Guide.from_pretrained(tmp_path / "one")
    assert again.trained_on == Origin("owner/base", COMMIT)
    again.save_pretrained(tmp_path / "two")
    text = (tmp_path / "two" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert text == (tmp_path / "one" / "config.json").read_text()


def test_a_guide_without_a_base_logs_nothing(
    make: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pilotfish"):
        make().attach(load(folder))
    assert not caplog.records


@pytest.mark.parametrize(
    "bad", ["base", {}, {"revision": "1"}, {"name": 3}, {"name": "a", "b": ""}]
)
def test_a_wrong_name_of_a_base_is_refused(
    bad: Any, make: Make, tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    make("base").save_pretrained(tmp_path)
    edit_config(tmp_path, trained_on=bad)
    with pytest.raises(GuideError, match="the name of a base"):
        Guide.from_pretrained(tmp_path)


def test_on_its_own_base_a_guide_logs_nothing(
    make: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pilotfish"):
        make("my-base").attach(load(folder))
    assert not caplog.records


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "other"}, "trained on other, used on my-base; the shapes match"),
        (
            {"name": "own/er", "revision": COMMIT},
            "trained on own/er at 451f4fe, used on my-base; the shapes match",
        ),
    ],
)
def test_on_another_base_that_fits_a_guide_logs_both(
    fields: dict[str, str], said: str, make: Make, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "pilotfish"):
        make(**fields).attach(load(folder))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert said in record.getMessage()


def test_another_commit_is_another_base() -> None:
    one, two = Origin("a/b", COMMIT), Origin("a/b", COMMIT[::-1])
    assert not one.same_as(two)
    assert one.same_as(Origin("a/b"))


def test_a_base_of_another_shape_is_refused_and_both_are_named(make: Make, folder: Path) -> None:
    pipe = load(folder, unet=components.unet(block_out_channels=(8, 32)))
    with pytest.raises(GuideError) as caught:
        make("owner/base").attach(pipe)
    sentence = str(caught.value)
    assert "trained on owner/base, used on an unnamed one" in sentence
    assert "middle: guide 16, denoiser 32" in sentence


def test_a_distilled_guide_remembers_its_base_and_follows_it(folder: Path, tmp_path: Path) -> None:
    """A checkpoint belongs to the base's weights, not to its folder."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    run = tmp_path / "run"
    arguments = [
        "distill", "--prompts", str(prompts), "--output", str(run), *SHORT,
        "--pretrained_model_name_or_path",
    ]  # fmt: skip
    assert cli.main([*arguments, str(folder), "--max_train_steps", "1"]) == 0
    assert Guide.from_pretrained(run / "guide").trained_on == Origin("my-base")
    assert str(tmp_path) not in (run / "guide" / "config.json").read_text()
    moved = folder.rename(tmp_path / "moved")
    more = ["--max_train_steps", "2", "--resume_from_checkpoint", "latest"]
    assert cli.main([*arguments, str(moved), *more]) == 0
    assert Guide.from_pretrained(run / "guide").trained_on == Origin("moved")


def test_every_type_remembers_its_base(guide_class: type[Guide], unet: Any, tmp_path: Path) -> None:
    guide = guide_class.for_denoiser(unet, "epsilon", trained_on={"name": "base"})
    guide.save_pretrained(tmp_path)
    assert Guide.from_pretrained(tmp_path).trained_on == Origin("base")
    guide.check(Backbone.of(unet).signature("epsilon"))
