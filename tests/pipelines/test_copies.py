"""A guided pipeline saved, copied, pickled, turned into another, given another denoiser."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from safetensors.torch import load_file

from pilotfish import GuideError
from pilotfish.pipelines import detach
from pilotfish.pipelines.attach import Guided
from pilotfish.pipelines.loading import share_weights
from tests import components
from tests.pipelines.matrix import covered
from tests.pipelines.pipelines import Pipeline, build, guide, guided, plain, twin
from tests.pipelines.specs import PIPELINES, SIDE


def again(thing: Any) -> Any:
    """The same from its pickle."""
    return pickle.loads(pickle.dumps(thing))  # noqa: S301


def another(one: Pipeline, pipe: Any) -> Pipeline:
    """The same call of another pipeline."""
    pipe.set_progress_bar_config(disable=True)
    return Pipeline(pipe, one.images, one.call)


@pytest.mark.parametrize("name", covered("save_pretrained"))
def test_nothing_of_the_guide_is_saved(name: str, tmp_path: Path) -> None:
    one = build(name)
    with guide(name).attached(one.pipe):
        one.latents()
        assert type(one.pipe).__name__ == PIPELINES[name].pipeline
        one.pipe.save_pretrained(tmp_path)
    assert "pilotfish" not in (tmp_path / "model_index.json").read_text().lower()
    saved = load_file(tmp_path / one.component / "diffusion_pytorch_model.safetensors")
    assert set(saved) == set(one.denoiser.state_dict())
    config = json.loads((tmp_path / one.component / "config.json").read_text())
    assert "pilotfish" not in json.dumps(config).lower()
    absent = {"text_encoder_3": None, "tokenizer_3": None} if "SD3" in name else {}
    loaded = DiffusionPipeline.from_pretrained(tmp_path, **absent)
    assert type(loaded) is type(one.pipe)
    torch.testing.assert_close(another(one, loaded).latents(), plain(name), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", covered("from_pipe"))
def test_another_pipeline_from_a_guided_one_does_cfg(name: str) -> None:
    one = build(name)
    image = {"image": torch.rand(2, 3, SIDE, SIDE)}
    with guide(name).attached(one.pipe):
        pipe = AutoPipelineForImage2Image.from_pipe(one.pipe)
        pipe.set_progress_bar_config(disable=True)
        with one.batches() as sizes:
            Pipeline(pipe, image, {"strength": 1.0, **one.call}).latents()
    assert set(sizes) == {4}


@pytest.mark.parametrize("copied", [copy, deepcopy, share_weights])
@pytest.mark.parametrize("name", covered("copy"))
def test_a_copy_has_the_guide_as_well(name: str, copied: Callable[[Any], Any]) -> None:
    one, used = build(name), guide(name)
    with used.attached(one.pipe):
        other = another(one, copied(one.pipe))
        assert isinstance(other.pipe, Guided)
        with other.batches() as sizes:
            assert torch.equal(other.latents(), guided(name))
            assert set(sizes) == {2}
        with pytest.raises(GuideError, match="has a guide already"):
            used.attach(other.pipe)
        detach(other.pipe)
        assert type(other.pipe).__name__ == PIPELINES[name].pipeline
        assert copied is copy or other.hooks() == 0
        assert torch.equal(other.latents(), plain(name))
        assert torch.equal(one.latents(), guided(name))
    assert torch.equal(one.latents(), plain(name))
    assert one.hooks() == 0


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_a_copied_denoiser_takes_the_guide_once(name: str) -> None:
    one, used = build(name), guide(name)
    with used.attached(one.pipe):
        other = twin(one, **{one.component: deepcopy(one.denoiser)})
        assert torch.equal(other.latents(), plain(name))
        with used.attached(other.pipe):
            assert torch.equal(other.latents(), guided(name))
        assert torch.equal(other.latents(), plain(name))


@pytest.mark.parametrize("name", covered("pickle"))
def test_pickled_with_the_guide_and_without(name: str) -> None:
    # transformers' text encoders cannot be pickled once they have given their hidden states
    one = build(name, alone=True)
    with guide(name).attached(one.pipe):
        other, unguided = (another(one, again(pipe)) for pipe in (one.pipe, twin(one).pipe))
        one.latents()
        assert torch.equal(other.latents(), guided(name))
        detach(other.pipe)
        assert torch.equal(other.latents(), plain(name))
        assert type(unguided.pipe).__name__ == PIPELINES[name].pipeline
        assert torch.equal(unguided.latents(), plain(name))
        alone = build(name, **{one.component: again(one.denoiser)})
        assert torch.equal(alone.latents(), plain(name))
        assert torch.equal(one.latents(), guided(name))


def _work(given: tuple[Pipeline, Pipeline, Any], results: Any) -> None:
    """In another process."""
    torch.set_num_threads(1)
    one, unguided, denoiser = given
    alone = Pipeline(unguided.pipe, unguided.images, unguided.call)
    found = [one.latents(), unguided.latents()]
    alone.denoiser = denoiser
    results.put([x.tolist() for x in (*found, alone.latents())])


def test_guided_and_plain_pipelines_go_to_a_spawned_process() -> None:
    """A guided pipeline with its guide; a plain one on its denoiser, and the denoiser, without."""
    one = build("SD", alone=True)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with guide("SD").attached(one.pipe):
        process = context.Process(target=_work, args=((one, twin(one), one.denoiser), results))
        process.start()
        found = [torch.tensor(x) for x in results.get(timeout=120)]
        process.join()
    for latents, expected in zip(found, (guided("SD"), plain("SD"), plain("SD")), strict=True):
        torch.testing.assert_close(latents, expected)


@pytest.mark.parametrize("name", covered("another denoiser"))
def test_another_denoiser_under_the_guide(name: str) -> None:
    one, other = build(name), build(name)
    torch.manual_seed(13)
    with torch.no_grad():
        for parameter in other.denoiser.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape))
    used = guide(name)
    with used.attached(other.pipe):
        expected = other.latents()
    assert not torch.allclose(guided(name), expected)
    before = one.denoiser
    unfit = {
        "SD3": lambda: components.sd3_transformer(num_layers=2),
        "PixArt": lambda: components.pixart_transformer(num_layers=3),
        "Sana": lambda: components.sana_transformer(num_layers=3),
        "Qwen": lambda: components.qwen_transformer(num_layers=2),
        "ZImage": lambda: components.z_image_transformer(n_layers=2),
        "Wan": lambda: components.wan_transformer(num_layers=3),
        "Lumina2": lambda: components.lumina2_transformer(num_layers=2),
    }.get(PIPELINES[name].family, lambda: components.unet(block_out_channels=(8, 32)))
    with used.attached(one.pipe):
        one.denoiser = other.denoiser
        assert torch.equal(one.latents(), expected)
        one.denoiser = unfit()
        with pytest.raises(GuideError, match=r"layers: guide .*, denoiser "):
            one.latents()
        assert one.hooks() == 0
    assert Pipeline(one.pipe).hooks() == other.hooks() == 0
    assert not any(m._forward_hooks for m in before.modules())
