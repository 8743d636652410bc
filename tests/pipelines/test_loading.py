"""Pipelines from folders as people have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pilotfish.pipelines.loading import (
    PipelineError,
    fine_tuned_weights,
    load_pipeline,
    use_deterministic_scheduler,
)
from tests.pipelines.pipelines import Pipeline, build, plain


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build("SD").pipe.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def half(folder: Path) -> None:
    """Leave an fp16 variant alone."""
    for path in folder.glob("*/*.safetensors"):
        save_file({k: v.half() for k, v in load_file(path).items()},
                  path.with_name(f"{path.stem}.fp16.safetensors"), {"format": "pt"})  # fmt: skip
        path.unlink()


def test_a_pipeline_from_a_folder(folder: Path) -> None:
    assert torch.equal(Pipeline(load_pipeline(folder)).latents(), plain("SD"))
    pipe = load_pipeline(folder, dtype=torch.bfloat16)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.bfloat16}


def test_a_variant_is_named_and_can_be_loaded(folder: Path) -> None:
    half(folder)
    with pytest.raises(
        PipelineError, match="it holds the variant fp16: pass it as variant"
    ) as told:
        load_pipeline(folder)
    assert str(told.value).startswith(f"no pipeline could be loaded from {folder}: ")
    pipe = load_pipeline(folder, variant="fp16")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    torch.testing.assert_close(Pipeline(pipe).latents(), plain("SD"), atol=0.1, rtol=0.1)


def test_of_a_single_file_it_says_how_to_make_a_folder(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(
        PipelineError, match=r"is a single file; make a folder of it once.*from_sin"
    ):
        load_pipeline(file)


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(PipelineError, match=r"^no pipeline could be loaded from .*empty: ") as told:
        load_pipeline(tmp_path / "empty")
    assert "variant" not in str(told.value)


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_the_weights_of_a_fine_tune(name: str, tmp_path: Path) -> None:
    one, tuned = build(name), build(name)
    with torch.no_grad():
        for parameter in tuned.denoiser.parameters():
            parameter.add_(1)
    tuned.denoiser.save_pretrained(tmp_path / "tuned")
    found = fine_tuned_weights(one.denoiser, tmp_path / "tuned")
    assert all(torch.equal(v, found[k]) for k, v in tuned.denoiser.state_dict().items())
    with pytest.raises(PipelineError, match="no fine-tune could be loaded from"):
        fine_tuned_weights(one.denoiser, tmp_path / "nothing")


@pytest.mark.parametrize("name", ["SD", "SD, v", "SD3"])
def test_the_deterministic_scheduler_keeps_the_noise_path(name: str) -> None:
    one = build(name)
    before = one.pipe.scheduler.config
    use_deterministic_scheduler(one.pipe)
    after = one.pipe.scheduler.config
    names = [k for k in ("prediction_type", "beta_schedule", "shift") if k in before]
    assert names
    assert {k: before[k] for k in names} == {k: after[k] for k in names}
