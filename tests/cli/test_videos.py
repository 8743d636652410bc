"""A pipeline of videos as its user meets it: trained from a folder, sampled as a GIF."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image

from pilotfish.training import context as training_context
from pilotfish.training import validation
from tests.cli.conftest import SHORT, Say
from tests.pipelines import pipelines
from tests.pipelines.pipelines import build, without_bins


@pytest.fixture
def video(tmp_path: Path) -> str:
    """A pipeline's folder."""
    build("LTX").pipe.save_pretrained(tmp_path / "video")
    return str(tmp_path / "video")


@pytest.fixture
def wan(tmp_path: Path) -> tuple[str, str]:
    """A pipeline's folder, whose own videos are small, and that of a guide."""
    build("Wan", alone=True).pipe.save_pretrained(tmp_path / "wan")
    pipelines.guide("Wan").save_pretrained(tmp_path / "guide")
    return str(tmp_path / "wan"), str(tmp_path / "guide")


def test_a_guide_is_trained_and_draws_videos(
    say: Say, video: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "STEPS", 2)
    one, output = build("LTX"), tmp_path / "run"
    without_bins(type(one.pipe), monkeypatch)
    trained = say(
        "distill", "--pretrained_model_name_or_path", video, "--prompts", prompts, "--num_frames",
        "5", "--resolutions", "32x32", "--cache_embeddings", str(tmp_path / "texts"),
        "--output", str(output), *SHORT,
    )  # fmt: skip
    assert trained == (0, trained[1])
    assert (output / "validation" / "step-4.png").is_file()
    folder = tmp_path / "videos"
    code, _ = say(
        "sample", "-p", "A cat!", "dog", "--models", video, "--guide", str(output / "guide"),
        "--num_frames", "9", "--num_inference_steps", "2", "--output", str(folder),
    )  # fmt: skip
    assert code == 0
    assert {file.name for file in folder.iterdir()} == {"a-cat-0.gif", "dog-1.gif", "grid.png"}
    with Image.open(folder / "a-cat-0.gif") as gif:
        assert (gif.size, gif.n_frames) == ((32, 32), 9)
        assert (gif.info["duration"], gif.info["loop"]) == (40, 0)
    assert Image.open(folder / "grid.png").size == (64, 32)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--num_frames", "6"), "num_frames of a LTXPipeline must be 1 more than a multiple of 4"),
        (("--num_frames", "0"), "num_frames must be above 0, not 0"),
        (("--training_samples", "noised", "--train_images", "{images}"), "the base makes videos"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_texts_are_encoded(
    say: Say, video: str, prompts: str, tmp_path: Path, flags: tuple[str, ...], words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("")
    monkeypatch.setattr(training_context, "cached_prompts", pytest.fail)
    code, error = say(
        "distill", "--pretrained_model_name_or_path", video, "--prompts", prompts,
        "--cache_embeddings", str(tmp_path / "texts"), "--output", str(tmp_path / "run"),
        *(flag.format(images=tmp_path) for flag in flags),
    )  # fmt: skip
    assert (code, error.count("\n")) == (1, 1)
    assert words in error


MEASURED: dict[str, tuple[str, ...]] = {
    "evaluate --grid": ("--samples", "2", "--rounds", "1", "--num_inference_steps", "2"),
    "evaluate --steps": ("--steps", "2", "--samples", "2", "--rounds", "1"),
    "evaluate --guidance_scales":
        ("--guidance_scales", "2", "--samples", "2", "--num_inference_steps", "2"),
    "evaluate --negative_prompts": ("--negative_prompts", "--num_inference_steps", "2"),
    "inspect": ("-p", "cat", "--num_inference_steps", "2"),
    "inspect --scales": ("-p", "cat", "--num_inference_steps", "2", "--guidance_scales", "2"),
}  # fmt: skip


@pytest.mark.parametrize("command", MEASURED)
def test_every_measurement_takes_videos_of_so_many_frames(
    say: Say, wan: tuple[str, str], prompts: str, tmp_path: Path, command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In every denoiser call, those of the guidance error and of the timing among them."""
    model, guide = wan
    frames, forward = set[int](), WanTransformer3DModel.forward

    def seen(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        frames.add(hidden_states.shape[2])
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(WanTransformer3DModel, "forward", wraps(forward)(seen))
    without_bins(WanPipeline, monkeypatch)
    name, *option = command.split()
    flags = [*MEASURED[command], "--models", model, "--guide", guide, "--num_frames", "9"]
    if name == "evaluate":
        flags += ["--prompts", prompts, "--validation_prompts", prompts]
    if option in (["--grid"], ["--scales"]):
        flags += [*option, str(tmp_path / "grid.png")]
    code, error = say(name, *flags, "--output", str(tmp_path / "out"))
    assert code == 0, error
    assert frames == {3}


@pytest.mark.parametrize("command", ["sample", "evaluate", "inspect"])
def test_frames_of_an_image_are_refused(say: Say, base: str, guide: str, command: str) -> None:
    prompt = () if command == "evaluate" else ("-p", "cat")
    given = (command, *prompt, "--models", base, "--guide", guide, "--num_frames", "5")
    code, error = say(*given)
    assert code == 1
    assert error.splitlines()[-1] == (
        f"pilotfish {command}: num_frames is for videos, and a StableDiffusionPipeline makes images"
    )


def test_a_pipeline_that_needs_an_image_is_not_sampled(
    say: Say, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: Any = build("Wan 2.1 image-to-video").pipe
    monkeypatch.setattr("pilotfish.cli.sample.open_model", lambda *_: made)
    call = ("sample", "-p", "cat", "--models", "x", "--mode", "cfg", "--output", str(tmp_path))
    code, error = say(*call)
    assert code == 1
    assert "a WanImageToVideoPipeline needs an image as input: attach the guide and" in error
