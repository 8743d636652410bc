"""Pipelines that cannot take a guide, and arguments that have no second pass to act on."""

from __future__ import annotations

from inspect import signature
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0
from torch import nn

from pilotfish import GuideError, TinyGuide
from tests import components
from tests.pipelines import refused, specs
from tests.pipelines.matrix import covered
from tests.pipelines.pipelines import build, guide, guided, plain


@pytest.mark.parametrize(("name", "why"), refused.ATTACHED)
def test_refused_when_attached(name: str, why: str) -> None:
    pipe = refused.build(name)
    before = set(vars(pipe))
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    with pytest.raises(GuideError) as caught:
        guide("SD").attach(pipe)
    assert str(caught.value) == refused.sentence(name, why)
    assert (type(pipe).__name__, set(vars(pipe))) == (name, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in denoiser.modules())


class NewTransformer(nn.Module):
    """A family that came out yesterday."""


@pytest.mark.parametrize("name", ["SD3", "PixArt-Sigma"])
def test_a_transformer_that_nobody_knows_is_refused(name: str) -> None:
    one = build(name)
    one.pipe.transformer = NewTransformer()
    with pytest.raises(GuideError, match=r"cannot take a guide: NewTransformer belongs to no fam"):
        guide(name).attach(one.pipe)
    one.pipe.transformer = None
    with pytest.raises(GuideError, match="has neither a unet nor a transformer; use it without"):
        guide(name).attach(one.pipe)


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(GuideError, match="dict cannot take a guide: dict has neither a unet nor"):
        guide("SD").attach({})


@pytest.mark.parametrize(
    ("name", "other", "differs"),
    [
        ("SD", "SD3", "family: guide unet, denoiser joint-dit"),
        ("SD", "PixArt-Sigma", "family: guide unet, denoiser cross-attention-dit"),
        ("SD3", "SD", "family: guide joint-dit, denoiser unet"),
        ("PixArt-Sigma", "SD3", "family: guide cross-attention-dit, denoiser joint-dit"),
        ("SD", "SDXL", "text_dim: guide 16, denoiser 32"),
        ("SD, v", "SD", "prediction_type: guide v_prediction, denoiser epsilon"),
    ],
)
def test_a_guide_of_another_family_is_refused_naming_both(
    name: str, other: str, differs: str
) -> None:
    one, used = build(other), guide(name)
    before = type(one.pipe), set(vars(one.pipe)), one.hooks()
    with pytest.raises(GuideError, match="was made for another denoiser") as caught:
        used.attach(one.pipe)
    assert differs in str(caught.value)
    assert (type(one.pipe), set(vars(one.pipe)), one.hooks()) == before


@pytest.mark.parametrize("name", ["SD", "SD3"])
def test_a_guide_of_another_version_of_the_signature_is_refused(name: str) -> None:
    one, used = build(name), guide(name)
    used.register_to_config(signature={**used.config.signature, "version": 0})
    with pytest.raises(GuideError, match=r"version: guide 0, denoiser 1\b"):
        used.attach(one.pipe)
    assert one.hooks() == 0


@pytest.mark.parametrize(
    ("config", "sides"),
    [
        ({"block_out_channels": (8, 32)}, r"layers: guide \['up_blocks.0.resnets.0', 16\]"),
        ({"cross_attention_dim": 24}, "text_dim: guide 16, denoiser 24"),
        ({"layers_per_block": 2}, "attention: guide .*, denoiser .*of 8"),
    ],
)
def test_a_denoiser_of_another_shape_is_refused_naming_both(
    config: dict[str, Any], sides: str
) -> None:
    one = build("SD", unet=components.unet(addition_embed_type=None, **config))
    with pytest.raises(GuideError, match=sides):
        guide("SD").attach(one.pipe)
    assert one.hooks() == 0


@pytest.mark.parametrize(("pipeline", "name"), refused.PAG.items())
def test_perturbed_attention_is_refused_in_a_call(pipeline: str, name: str) -> None:
    layers = {"SD3": "blocks.0", "PixArt-Sigma": "blocks.1"}.get(name, "mid")
    parts: dict[str, Any] = {"pag_applied_layers": [layers]}
    if name == "SD3":  # diffusers' own processor has no norms
        parts["transformer"] = components.sd3_transformer(
            in_channels=16, out_channels=16, dual_attention_layers=(), qk_norm=None
        )
    one = build(name, pipeline, **parts)
    used = TinyGuide.for_denoiser(one.denoiser, specs.PIPELINES[name].prediction_type).eval()
    perturbed, conditional = (
        one.latents(pag_scale=3.0),
        one.latents(pag_scale=3.0, guidance_scale=1.0),
    )
    without = one.latents(pag_scale=0.0, guidance_scale=1.0)
    with used.attached(one.pipe):
        with pytest.raises(GuideError) as caught:
            one.latents(pag_scale=3.0)
        assert str(caught.value) == refused.sentence(pipeline)
        with one.batches() as sizes:
            assert torch.equal(one.latents(pag_scale=0.0), without)
        assert sizes == [2, 2]
        assert torch.equal(one.latents(pag_scale=3.0, guidance_scale=1.0), conditional)
    assert torch.equal(one.latents(pag_scale=3.0), perturbed)


@pytest.mark.parametrize("name", covered("guidance_rescale"))
def test_rescaling_warns(name: str) -> None:
    one = build(name)
    with (
        guide(name).attached(one.pipe),
        pytest.warns(UserWarning, match="guidance_rescale acts on the second pass"),
    ):
        assert torch.equal(one.latents(guidance_rescale=0.7), guided(name))


@pytest.mark.parametrize("name", covered("guess_mode"))
def test_guess_mode_warns(name: str) -> None:
    one = build(name)
    conditional = one.latents(guidance_scale=1.0, guess_mode=True)
    with (
        guide(name, trained=False).attached(one.pipe),
        pytest.warns(UserWarning, match="guess_mode acts on the second pass"),
    ):
        assert torch.equal(one.latents(guess_mode=True), conditional)


def test_a_controlnet_that_guesses_by_itself_warns() -> None:
    one = build("SD ControlNet", alone=True)
    one.pipe.controlnet.register_to_config(global_pool_conditions=True)
    with (
        guide("SD ControlNet").attached(one.pipe),
        pytest.warns(UserWarning, match="guess_mode acts on the second pass"),
    ):
        one.latents()


@pytest.mark.parametrize("name", covered("negative_original_size"))
def test_sizes_of_the_second_pass_warn(name: str) -> None:
    one = build(name)
    sizes = {"negative_original_size": (8, 8), "negative_target_size": (8, 8)}
    with (
        guide(name).attached(one.pipe),
        pytest.warns(UserWarning, match="negative_original_size acts on the second pass"),
    ):
        assert torch.equal(one.latents(**sizes), guided(name))


@pytest.mark.parametrize("name", covered("skip_guidance_layers"))
def test_skipped_layers_warn(name: str) -> None:
    one = build(name)
    with (
        guide(name).attached(one.pipe),
        pytest.warns(UserWarning, match="skip_guidance_layers acts on the second pass"),
    ):
        assert torch.equal(one.latents(skip_guidance_layers=[0]), guided(name))


@pytest.mark.parametrize("name", covered("cfg_normalization"))
def test_another_rule_of_guidance_warns(name: str) -> None:
    default = signature(type(build(name).pipe).__call__).parameters["cfg_normalization"].default
    has_no_effect(name, cfg_normalization=not default)


@pytest.mark.parametrize("name", covered("cfg_trunc_ratio"))
def test_the_end_of_guidance_warns(name: str) -> None:
    has_no_effect(name, cfg_trunc_ratio=0.5)


def has_no_effect(name: str, **given: Any) -> None:
    """With a guide, and one is warned."""
    one = build(name)
    assert not torch.equal(one.latents(**given), plain(name))
    with (
        guide(name).attached(one.pipe),
        pytest.warns(UserWarning, match=f"{next(iter(given))} acts on the second pass"),
    ):
        assert torch.equal(one.latents(**given), guided(name))


def test_a_pipeline_with_a_guider_is_refused() -> None:
    pipe = refused.build("HunyuanImagePipeline")
    pipe.register_modules(guider=diffusers.AdaptiveProjectedMixGuidance())
    with pytest.raises(GuideError, match="its guider makes the second pass and combines the two"):
        guide("SD").attach(pipe)


@pytest.mark.parametrize(
    ("pipeline", "why"),
    [
        (
            "LTXConditionPipeline",
            "its denoiser reads frames in addition to those that it generates",
        ),
        ("LTXI2VLongMultiPromptPipeline", "it calls its denoiser for parts of a longer video"),
    ],
)
def test_ltxs_relatives_are_refused(pipeline: str, why: str) -> None:
    parts = build("LTX").pipe.components
    with pytest.raises(GuideError, match=f"{pipeline} cannot take a guide: {why}"):
        guide("LTX").attach(getattr(diffusers, pipeline)(**parts))


def test_a_guidance_distilled_denoiser_is_refused() -> None:
    pipe = build("Qwen-Image", transformer=components.qwen_transformer(guidance_embeds=True)).pipe
    with pytest.raises(GuideError, match="its denoiser takes in the guidance scale and needs no"):
        guide("Qwen-Image").attach(pipe)


def test_two_negative_prompts_or_too_few_are_refused() -> None:
    one = build("Qwen-Image")
    embeds, mask = one.pipe.encode_prompt(["red", "blue"])
    given = {"negative_prompt_embeds": embeds, "negative_prompt_embeds_mask": mask}
    with guide("Qwen-Image").attached(one.pipe):
        with pytest.raises(GuideError, match="give negative_prompt or negative_prompt_embeds"):
            one.latents(negative_prompt=["a", "b"], **given)
        with pytest.raises(GuideError, match="returned 2 negative prompts for 4 images, and"):
            one.latents(prompt=["a", "b", "a", "b"], negative_prompt=["a", "b"])


@pytest.mark.parametrize("refresh", [0, 2])
def test_an_ip_adapter_of_chroma_is_refused_in_a_call(refresh: int) -> None:
    one = build("Chroma")
    images = {"ip_adapter_image_embeds": [torch.zeros(2, 1, 8)]}
    with (
        guide("Chroma").attached(one.pipe, refresh=refresh),
        pytest.raises(GuideError, match="a guide does not work with an IP-Adapter of Chroma"),
    ):
        one.latents(joint_attention_kwargs=images)


def test_custom_diffusion_is_refused_and_nothing_is_left() -> None:
    one = build("SD")
    unet = one.pipe.unet
    processors = {
        name: CustomDiffusionAttnProcessor2_0(
            hidden_size=unet.get_submodule(name.removesuffix(".processor")).inner_dim,
            cross_attention_dim=unet.config.cross_attention_dim,
        )
        if "attn2" in name
        else processor
        for name, processor in unet.attn_processors.items()
    }
    unet.set_attn_processor(processors)
    with pytest.raises(GuideError, match="keys and values of Custom Diffusion, which cannot be"):
        guide("SD").attach(one.pipe)
    assert one.hooks() == 0
