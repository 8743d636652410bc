"""A guide on a pipeline: what the user sees, and what must not change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from safetensors.torch import load_file

from pilotfish.guides import Guide, TinyGuide
from pilotfish.interface import GuideError

Pipe = StableDiffusionPipeline
Draw = Callable[..., torch.Tensor]


@pytest.mark.parametrize("scale", [1.0, 2.5, 7.5])
def test_a_fresh_guide_changes_nothing(fresh: Guide, pipe: Pipe, draw: Draw, scale: float) -> None:
    plain = draw(pipe, guidance_scale=1.0)
    with fresh.attached(pipe):
        assert torch.equal(draw(pipe, guidance_scale=scale), plain)


@pytest.mark.parametrize("scale", [1.0, 0.0, 0.5])
def test_up_to_one_a_trained_guide_changes_nothing(
    trained: Guide, pipe: Pipe, draw: Draw, scale: float
) -> None:
    plain = draw(pipe, guidance_scale=scale)
    with trained.attached(pipe):
        assert torch.equal(draw(pipe, guidance_scale=scale), plain)
        assert not torch.allclose(draw(pipe, guidance_scale=4.0), plain)


def test_detaching_restores_cfg(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    cfg = draw(pipe)
    before = (type(pipe), set(vars(pipe)))
    trained.attach(pipe)
    assert not torch.equal(draw(pipe), cfg)
    trained.detach(pipe)
    assert (type(pipe), set(vars(pipe))) == before
    assert torch.equal(draw(pipe), cfg)


def test_the_block_detaches_after_an_error(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    cfg = draw(pipe)
    with pytest.raises(RuntimeError, match="on purpose"), trained.attached(pipe):
        raise RuntimeError("on purpose")
    assert type(pipe) is StableDiffusionPipeline
    assert torch.equal(draw(pipe), cfg)


def test_a_call_that_fails_leaves_the_guide_working(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    cfg = draw(pipe)
    with trained.attached(pipe):
        guided = draw(pipe)
        with pytest.raises(RuntimeError, match="on purpose"):
            draw(pipe, callback_on_step_end=fail)
        assert torch.equal(draw(pipe), guided)
    assert torch.equal(draw(pipe), cfg)


@pytest.mark.parametrize(
    ("prompt", "call", "size"),
    [
        ("cat", {}, 1),
        (["cat", "dog", "a bee"], {}, 3),
        (["cat", "dog"], {"num_images_per_prompt": 2}, 4),
        (["cat", "dog"], {"num_images_per_prompt": 2, "negative_prompt": ["red", "blue"]}, 4),
    ],
)
def test_one_pass_a_step(
    trained: Guide,
    pipe: Pipe,
    draw: Draw,
    batches: Callable[..., Any],
    prompt: Any,
    call: dict[str, Any],
    size: int,
) -> None:
    with batches(pipe.unet) as sizes:
        draw(pipe, prompt, **call)
        assert sizes == [2 * size] * 3
    with trained.attached(pipe), batches(pipe.unet) as sizes:
        assert len(draw(pipe, prompt, **call)) == size
        assert sizes == [size] * 3


def test_the_negative_prompt_reaches_the_guide_picture_by_picture(
    trained: Guide, pipe: Pipe, draw: Draw
) -> None:
    seen: list[torch.Tensor] = []
    trained.register_forward_pre_hook(lambda _, args: seen.append(args[0].negative_hidden_states))
    negatives = ["red", "blue"]
    expected = pipe.encode_prompt(negatives, "cpu", 2, False)[0]
    with trained.attached(pipe):
        draw(pipe, ["cat", "dog"], num_images_per_prompt=2, negative_prompt=negatives)
    assert len(seen) == 3
    for states in seen:
        torch.testing.assert_close(states, expected)


def test_prompt_embeds_serve_as_well(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    states, negative = pipe.encode_prompt(["cat"], "cpu", 1, True, ["red"])
    embeds = {"prompt_embeds": states, "negative_prompt_embeds": negative}
    with trained.attached(pipe):
        expected = draw(pipe, ["cat"], negative_prompt=["red"])
        generator = torch.Generator().manual_seed(5)
        call = {"num_inference_steps": 3, "output_type": "latent", "generator": generator}
        assert torch.equal(pipe(guidance_scale=4.0, **embeds, **call).images, expected)


def test_the_scale_reaches_the_guide_as_it_is(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    seen: list[float] = []
    trained.register_forward_pre_hook(lambda _, args: seen.extend(args[0].guidance_scale.tolist()))
    with trained.attached(pipe):
        draw(pipe, guidance_scale=2.75)
        assert pipe.guidance_scale == 2.75
    assert seen == [2.75] * 3


def test_a_cutoff_turns_the_guide_off(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    """The official CFG-cutoff callbacks set the scale to 0 on the way."""
    calls: list[int] = []
    trained.register_forward_pre_hook(lambda *_: calls.append(1))

    def cut(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return kwargs

    with trained.attached(pipe):
        draw(pipe, callback_on_step_end=cut)
    assert len(calls) == 1


def test_a_scale_outside_the_trained_range_warns(trained: Guide, pipe: Pipe, draw: Draw) -> None:
    high = trained.guidance_scale_range[1]
    with trained.attached(pipe):
        with pytest.warns(UserWarning, match="outside"):
            draw(pipe, guidance_scale=high + 1)
        with pytest.warns(UserWarning, match="guidance_rescale"):
            draw(pipe, guidance_rescale=0.7)


def test_image_to_image_takes_the_same_guide(
    trained: Guide, pipe: Pipe, batches: Callable[..., Any]
) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(11))

    def draw(scale: float) -> torch.Tensor:
        return other(
            ["cat", "dog"],
            image=image,
            strength=0.5,
            num_inference_steps=4,
            guidance_scale=scale,
            generator=torch.Generator().manual_seed(5),
            output_type="latent",
        ).images

    plain = draw(1.0)
    with trained.attached(other), batches(pipe.unet) as sizes:
        assert not torch.allclose(draw(4.0), plain)
        assert sizes == [2, 2]
        assert torch.equal(draw(1.0), plain)


def test_saving_a_guided_pipeline_saves_no_guide(
    trained: Guide, pipe: Pipe, draw: Draw, tmp_path: Path
) -> None:
    cfg = draw(pipe)
    with trained.attached(pipe):
        assert type(pipe).__name__ == "StableDiffusionPipeline"
        pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert {k for k in index if not k.startswith("_")} - {"requires_safety_checker"} == set(
        pipe.components
    )
    saved = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(saved) == set(pipe.unet.state_dict())
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert config["time_cond_proj_dim"] is None
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is StableDiffusionPipeline
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again), cfg)


def test_a_second_guide_is_refused(trained: Guide, pipe: Pipe) -> None:
    with trained.attached(pipe), pytest.raises(GuideError, match="detach"):
        trained.attach(pipe)


def test_detaching_what_is_not_attached_is_refused(trained: Guide, pipe: Pipe) -> None:
    with pytest.raises(GuideError, match="not attached"):
        trained.detach(pipe)


def test_a_pipeline_without_unet_is_refused(trained: Guide) -> None:
    with pytest.raises(GuideError, match="dict cannot take a guide: it has no UNet"):
        trained.attach({})


@pytest.mark.parametrize(
    ("config", "field", "sides"),
    [
        ({"block_out_channels": (8, 32)}, "block_out_channels", ("[8, 16]", "[8, 32]")),
        ({"cross_attention_dim": 24}, "cross_attention_dim", ("16", "24")),
        ({"layers_per_block": 2}, "layers_per_block", ("1", "2")),
    ],
)
def test_a_denoiser_of_another_shape_is_refused_naming_both_sides(
    trained: Guide,
    pipe: Pipe,
    make_unet: Callable[..., Any],
    config: dict[str, Any],
    field: str,
    sides: tuple[str, str],
) -> None:
    pipe.unet = make_unet(**config)
    with pytest.raises(GuideError) as caught:
        trained.attach(pipe)
    mine, theirs = sides
    assert f"{field}: guide {mine}, denoiser {theirs}" in str(caught.value)
    assert type(pipe) is StableDiffusionPipeline


def test_another_prediction_type_is_refused_naming_both_sides(
    make_pipe: Callable[[str], Pipe],
) -> None:
    guide = TinyGuide.for_denoiser(make_pipe("epsilon").unet, "epsilon")
    with pytest.raises(GuideError, match="guide epsilon, denoiser v_prediction"):
        guide.attach(make_pipe("v_prediction"))


def test_v_prediction_is_guided_alike(
    make_pipe: Callable[[str], Pipe], draw: Draw, randomise: Callable[..., Guide]
) -> None:
    pipe = make_pipe("v_prediction")
    guide = TinyGuide.for_denoiser(pipe.unet, "v_prediction").eval()
    plain = draw(pipe, guidance_scale=1.0)
    with guide.attached(pipe):
        assert torch.equal(draw(pipe), plain)
    with randomise(guide).attached(pipe):
        assert not torch.allclose(draw(pipe), plain)
        assert torch.equal(draw(pipe, guidance_scale=1.0), plain)
