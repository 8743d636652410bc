"""What a guide remembers of its base, and says when it meets another."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from pilotfish import bundled
from pilotfish.backbones import Origin, fingerprint, portable_path, public_name
from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideError

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


def test_a_folder_is_known_by_its_last_part(folder: Path) -> None:
    assert Origin.of(load(folder).unet) == Origin("my-base")
    alone = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert Origin.of(alone) == Origin("my-base")


def test_what_was_made_in_memory_has_no_origin(unet: UNet2DConditionModel) -> None:
    assert Origin.of(unet) is None


def test_the_hubs_cache_tells_id_and_commit(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "hub" / "models--some-one--sd.x" / "snapshots" / COMMIT
    shutil.copytree(folder, place)
    assert Origin.of(load(place).unet) == Origin("some-one/sd.x", COMMIT)


def test_a_lora_is_another_denoiser() -> None:
    plain, tuned = (Origin.of(bundled.load_model(n).unet) for n in ("base", "emojione"))
    assert plain == Origin("base")
    assert tuned == Origin("base", lora=True)
    assert not plain.same_as(tuned)


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
def test_no_folder_of_a_machine_is_told(where: str, name: str, portable: str) -> None:
    assert public_name(where) == name
    assert portable_path(where) == portable


def test_saved_it_remembers_and_tells_no_path(make: Make, tmp_path: Path) -> None:
    make("owner/base", revision=COMMIT).save_pretrained(tmp_path / "one")
    again = Guide.from_pretrained(tmp_path / "one")
    assert again.trained_on == Origin("owner/base", COMMIT)
    again.save_pretrained(tmp_path / "two")
    text = (tmp_path / "two" / "config.json").read_text()
    assert str(tmp_path) not in text
    assert text == (tmp_path / "one" / "config.json").read_text()


def test_a_guide_from_before_loads_and_says_nothing(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    shutil.copytree(bundled.GUIDES / "tiny", tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    config = json.loads(file.read_text())
    config.pop("trained_on", None)
    file.write_text(json.dumps(config))
    weights = file.with_name("diffusion_pytorch_model.safetensors")
    save_file(load_file(weights), weights)  # an old file has no checksum
    guide = Guide.from_pretrained(tmp_path / "old")
    assert guide.trained_on is None
    with caplog.at_level(logging.INFO, "pilotfish"):
        guide.attach(bundled.load_model("fluent"))
    assert not caplog.records


@pytest.mark.parametrize(
    "bad", ["base", {}, {"revision": "1"}, {"name": 3}, {"name": "a", "b": ""}]
)
def test_a_base_that_is_none_is_refused(
    bad: Any, make: Make, tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    make("base").save_pretrained(tmp_path)
    edit_config(tmp_path, trained_on=bad)
    with pytest.raises(GuideError, match="the name of a base"):
        Guide.from_pretrained(tmp_path)


def test_on_its_own_base_it_is_silent(
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
def test_on_another_base_that_fits_it_names_both(
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


def test_on_another_shape_it_is_refused_and_both_are_named(make: Make, tmp_path: Path) -> None:
    guide = make("owner/base")
    with pytest.raises(GuideError) as caught:
        guide.attach(bundled.load_model("fluent"))
    sentence = str(caught.value)
    assert "trained on owner/base, used on fluent" in sentence
    assert "block_out_channels: guide [8, 16], denoiser [176]" in sentence


def test_a_distilled_guide_remembers_its_base(folder: Path, tmp_path: Path) -> None:
    from pilotfish import cli

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    own = ["--pretrained_model_name_or_path", str(folder), "--prompts", str(prompts)]
    short = [
        "--train_batch_size", "2", "--max_train_steps", "1", "--pool", "4", "--replay_capacity",
        "4", "--report_to", "none", "--validation_steps", "9",
    ]  # fmt: skip
    run = tmp_path / "run"
    assert cli.main(["distill", *own, *short, "--output_dir", str(run)]) == 0
    assert Guide.from_pretrained(run / "guide").trained_on == Origin("my-base")
    assert str(tmp_path) not in (run / "guide" / "config.json").read_text()
    steps = ["--guide", str(run / "guide"), "--steps", "2", "--output_dir", str(tmp_path / "few")]
    assert cli.main(["distill-steps", *own, *short, *steps]) == 0
    few = tmp_path / "few" / "steps-2" / "guide"
    assert Guide.from_pretrained(few).trained_on == Origin("my-base")
    assert str(tmp_path) not in (few / "config.json").read_text()


def test_a_run_whose_base_has_moved_goes_on(folder: Path, tmp_path: Path) -> None:
    """The checksum, not the name, is what a checkpoint goes by."""
    from pilotfish import cli

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\nc\n")
    base = "--pretrained_model_name_or_path"
    run = [
        "distill", "--prompts", str(prompts), "--output_dir", str(tmp_path / "run"),
        "--train_batch_size", "2", "--pool", "4", "--replay_capacity", "4", "--report_to", "none",
        "--validation_steps", "9",
    ]  # fmt: skip
    assert cli.main([*run, base, str(folder), "--max_train_steps", "1"]) == 0
    moved = folder.rename(tmp_path / "moved")
    assert cli.main([*run, base, str(moved), "--max_train_steps", "2", "--resume", "latest"]) == 0
    assert Guide.from_pretrained(tmp_path / "run" / "guide").trained_on == Origin("moved")


def test_every_kind_remembers(guide_class: type[Guide], unet: Any, tmp_path: Path) -> None:
    guide = guide_class.for_denoiser(unet, "epsilon", trained_on={"name": "base"})
    guide.save_pretrained(tmp_path)
    assert Guide.from_pretrained(tmp_path).trained_on == Origin("base")
    guide.check(fingerprint(unet, "epsilon"))
