"""What FLUX.2 klein has of its own: negative prompts as embeddings, images to refer to, a VAE with
statistics of packed latents."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from pilotfish import GuideError
from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.backbones.flux2_dit import image_ids, text_ids
from pilotfish.interface import GuideOutput
from pilotfish.pipelines.sampling import decode, encode, image_size
from pilotfish.training.config import ConfigError
from pilotfish.training.context import TrainingContext
from tests import components
from tests.backbones.stubs import FixedGuide, equal_gains
from tests.pipelines.pipelines import PROMPTS, Pipeline, build, guide, plain, without_bins
from tests.pipelines.specs import SIDE
from tests.pipelines.test_core import negatives

NAME = "FLUX.2 klein"
IMAGE = Image.new("RGB", (96, 64), (200, 30, 90))


def test_a_negative_prompt_of_another_length() -> None:
    """Two passes in one batch could not take it."""
    one = build(NAME)
    shorter = one.encoded(["red", "blue"])[:, :5]
    seen = negatives(one, NAME, negative_prompt_embeds=shorter)
    assert all(torch.equal(text.embeds, shorter) for text in seen)
    with guide(NAME).attached(one.pipe, refresh=1), pytest.raises(GuideError, match="two lengths"):
        one.latents(negative_prompt_embeds=shorter)


@pytest.mark.parametrize("kind", ["references", "inpaint"])
def test_images_that_the_denoiser_reads(kind: str) -> None:
    if kind == "inpaint":
        one = build(NAME, "Flux2KleinInpaintPipeline")
        mask = (torch.arange(SIDE) < SIDE // 2).float().expand(1, 1, SIDE, SIDE)
        call: dict[str, Any] = {"image": IMAGE.resize((SIDE, SIDE)), "mask_image": mask}
        call |= {"strength": 0.7, "num_inference_steps": 3}
    else:
        one = build(NAME)
        call = {"image": [IMAGE, IMAGE.resize((64, 64))]}
    none, cfg = one.latents(guidance_scale=1.0, **call), one.latents(**call)
    assert not torch.allclose(none, plain(NAME, 1.0))
    with guide(NAME, trained=False).attached(one.pipe), one.batches() as sizes:
        assert torch.equal(one.latents(**call), none)
    assert set(sizes) == {2}
    with guide(NAME).attached(one.pipe):
        assert not torch.allclose(one.latents(**call), none, atol=1e-3)
    with guide(NAME).attached(one.pipe, refresh=1.0):
        torch.testing.assert_close(one.latents(**call), cfg, atol=1e-4, rtol=1e-4)
    assert torch.equal(one.latents(**call), cfg)


@torch.no_grad()
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_beside_a_reference() -> None:
    family = components.FAMILIES["flux2"]
    denoiser, latents = family.denoiser(), family.latents(2)
    own, reference = latents.flatten(2).mT, torch.randn(2, 6, 4)
    other = image_ids(torch.Size([2, 3]), latents.device)
    other[:, 0] = 10

    def call(text: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = denoiser(
            hidden_states=torch.cat([own, reference], 1), encoder_hidden_states=text,
            timestep=torch.tensor([0.9, 0.2]), txt_ids=text_ids(text.shape[1], text.device),
            img_ids=torch.cat([image_ids(latents.shape[-2:], latents.device), other]),
            return_dict=False,
        )[0]  # fmt: skip
        return made[:, : own.shape[1]]

    negative = family.text(2, 5, seed=3)
    expected = call(negative.embeds)
    used = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)))
    Backbone.of(denoiser).install(used)
    with GuidedPass(used, lambda: 4.0, lambda: negative).open():
        torch.testing.assert_close(call(family.text(2).embeds), expected, atol=1e-5, rtol=1e-4)
    (inputs,) = used.inputs
    assert torch.equal(inputs.latents, latents)


def test_latents_are_encoded_and_decoded_as_in_the_pipeline() -> None:
    one = build(NAME, alone=True)
    vae = one.pipe.vae
    assert vae.bn.running_mean is not None
    vae.bn.running_mean.uniform_(-1.0, 1.0)
    images = one.latents(output_type="pt")
    latents = Backbone.of_pipeline(one.pipe).final_latents(one.latents(), one.pipe, one.call)
    found = (decode(one.pipe, latents) + 1) / 2
    torch.testing.assert_close(found, images)
    pixels = 2 * torch.rand(2, 3, SIDE, SIDE) - 1
    with torch.no_grad():
        expected = one.pipe._encode_vae_image(pixels, None)
    torch.testing.assert_close(encode(one.pipe, pixels), expected)
    backbone, token = Backbone.of_pipeline(one.pipe), SIDE // expected.shape[-1]
    assert image_size(one.pipe) == token * backbone.latent_shape()[-1]


def test_the_grid_of_a_scheduler_with_dynamic_shifting(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    one = build(NAME, scheduler=scheduler)
    without_bins(type(one.pipe), monkeypatch)
    context = TrainingContext(one.pipe, PROMPTS, PROMPTS)
    for steps in (2, 4):
        one.latents(num_inference_steps=steps)
        torch.testing.assert_close(context.path.grid(steps), one.pipe.scheduler.sigmas)
    with pytest.raises(ValueError, match="shifts its times by the size of images"):
        TrainingContext(build("SD3", scheduler=scheduler).pipe, PROMPTS, PROMPTS)


def parts(one: Pipeline, **changed: Any) -> dict[str, Any]:
    return {**one.pipe.components, **changed}


@pytest.mark.parametrize(
    ("pipeline", "changed", "why"),
    [
        (
            "Flux2KleinPipeline", {"is_distilled": True},
            "its denoiser is distilled (is_distilled) and needs no second pass",
        ),
        (
            "Flux2KleinKVPipeline", {},
            "it has no property do_classifier_free_guidance that turns its second pass off",
        ),
        (
            "Flux2Pipeline", {"guidance_embeds": True},
            "its denoiser takes in the guidance scale and needs no second pass",
        ),
    ],
)  # fmt: skip
def test_distilled_forms_are_refused(pipeline: str, changed: dict[str, Any], why: str) -> None:
    one = build(NAME)
    if "guidance_embeds" in changed:
        changed = {"transformer": components.flux2_transformer(in_channels=16, **changed)}
    pipe = getattr(diffusers, pipeline)(**parts(one, **changed))
    with pytest.raises(GuideError) as caught:
        guide(NAME).attach(pipe)
    assert str(caught.value) == f"{pipeline} cannot take a guide: {why}; use it without one"


def test_an_inpainting_pipeline_is_no_base_of_a_training() -> None:
    one = build(NAME, "Flux2KleinInpaintPipeline")
    with pytest.raises(ConfigError, match="Flux2KleinInpaintPipeline, which needs an image as"):
        TrainingContext(one.pipe, PROMPTS, PROMPTS)
