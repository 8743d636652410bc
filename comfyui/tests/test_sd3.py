"""What is particular to Stable Diffusion 3 in ComfyUI."""

from __future__ import annotations

from typing import Any

import comfy_extras.nodes_model_advanced
import pytest
import torch
from diffusers import SD3Transformer2DModel
from kinds import (
    STEPS,
    Prompt,
    W,
    count_rows,
    draw_comfyui,
    draw_diffusers,
    guide_for,
    on_comfyui,
    report,
)
from mmdits import BUNDLED, KINDS, SD3, SD35, MMDiTKind, load
from pilotfish_comfyui.convert import ConversionError, convert
from pilotfish_comfyui.loading import apply_guide

from pilotfish import bundled
from pilotfish.guides import TinyGuide
from pilotfish.interface import GuideError
from pilotfish.pipelines.loading import load_pipeline

TRAINED = bundled.FOLDER / "sd3"
"""The bundled transformer, where there is one."""
PROMPTS = SD35.conditionings()

# -- the bundled one ------------------------------------------------------------------------------


def bundled_pipeline() -> Any:
    """The bundled Stable Diffusion 3; where there is none yet, with random weights, and embeddings
    in place of its text encoders."""
    if not TRAINED.is_dir():
        return BUNDLED.pipeline
    pipe: Any = load_pipeline(TRAINED)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def bundled_prompts(pipe: Any) -> list[Prompt]:
    """A prompt and a negative prompt, as its pipeline encodes them."""
    if pipe.text_encoder is None:
        return list(BUNDLED.prompts())
    encoded = pipe.encode_prompt("red apple", None, None, negative_prompt="owl")
    text, negative, pooled, negative_pooled = (tensor.detach() for tensor in encoded)
    return [Prompt(text, pooled), Prompt(negative, negative_pooled)]


def bundled_guide(pipe: Any) -> TinyGuide:
    """That of the bundled transformer; where there is none yet, a random one."""
    if TRAINED.is_dir() and "sd3-tiny" in bundled.guide_names():
        guide = bundled.load_guide("sd3-tiny")
        assert isinstance(guide, TinyGuide)
        return guide
    return guide_for(pipe.transformer, BUNDLED.prediction, by=0.02)


def test_the_bundled_model() -> None:
    """With its own weights, text encoders and guide where they are there, and else random ones."""
    pipe = bundled_pipeline()
    guide, prompts = bundled_guide(pipe), bundled_prompts(pipe)
    what = f"bundled ({'trained' if TRAINED.is_dir() else 'random weights'}), "
    conditionings, loading = [p.conditioning() for p in prompts], load(pipe.transformer)
    model, rows = count_rows(loading)
    for w in (1.0, W):
        rows.clear()
        theirs = draw_diffusers(BUNDLED, pipe, *prompts, w)
        made = draw_comfyui(model, *conditionings, w)
        assert report(f"{what}w={w:g}", theirs, made) < BUNDLED.bound
    assert rows == STEPS * [2]
    for refresh in (2, 0):
        model, rows = count_rows(apply_guide(loading, on_comfyui(guide), refresh))
        with guide.attached(pipe, refresh=refresh):
            theirs = draw_diffusers(BUNDLED, pipe, *prompts, W)
        made = draw_comfyui(model, *conditionings, W)
        assert report(f"{what}guided, refresh={refresh}", theirs, made) < BUNDLED.bound
    print(f"{2 * STEPS} denoiser passes with CFG, {sum(rows)} with the guide")
    assert rows == STEPS * [1]
    scale = pipe.vae.config.scaling_factor
    with torch.inference_mode():
        images = [pipe.vae.decode(latents / scale).sample for latents in (theirs, made)]
    report(f"{what}guided, images", *images)
    assert torch.allclose(*images, atol=2 / 255)


# -- what a UNet has not --------------------------------------------------------------------------


def test_prompts_of_two_lengths() -> None:
    """They are left as they are: the tokens attend to each other, so a repeated prompt is another
    one. Refreshed in all steps the result is CFG's."""
    prompts = SD35.prompt(5, tokens=12).conditioning(), SD35.prompt(2).conditioning()
    expected = draw_comfyui(SD35.model(), *prompts, W)
    assert torch.equal(draw_comfyui(SD35.guided(refresh=STEPS), *prompts, W), expected)
    for joint_attention in ("whole", "sampled"):
        made = draw_comfyui(SD35.guided(refresh=1, joint_attention=joint_attention), *prompts, W)
        assert torch.isfinite(made).all()
        assert not torch.allclose(made, expected, atol=20 * SD35.bound)


def test_latents_that_the_patches_do_not_divide() -> None:
    """ComfyUI pads them."""
    for refresh, guide in ((0, SD35.guide()), (2, SD35.guide(times=(0.9, 0.8, 0.5, 0)))):
        model = apply_guide(SD35.model(), on_comfyui(guide), refresh)
        made = draw_comfyui(model, *PROMPTS, W, image=torch.zeros(1, SD35.channels, 7, 5))
        assert made.shape[-2:] == (7, 5)
        assert torch.isfinite(made).all()


def test_a_shift_of_the_noise_levels() -> None:
    """*ModelSamplingSD3* changes the steps, and the guide is on the model before or after it."""
    node = comfy_extras.nodes_model_advanced.ModelSamplingSD3()
    (before,) = node.patch(SD35.guided(), 5.0)
    after = apply_guide(node.patch(SD35.model(), 5.0)[0], on_comfyui(SD35.guide()), 0)
    made = draw_comfyui(before, *PROMPTS, W)
    assert torch.equal(draw_comfyui(after, *PROMPTS, W), made)
    assert not torch.allclose(draw_comfyui(SD35.guided(), *PROMPTS, W), made, atol=20 * SD35.bound)


# -- what is refused ------------------------------------------------------------------------------


def test_a_patch_that_replaces_blocks_is_refused() -> None:
    model = SD35.model()
    model.set_model_patch_replace(lambda given, more: given, "dit", "double_block", 1)
    with pytest.raises(GuideError, match="replaces blocks of the transformer"):
        apply_guide(model, on_comfyui(SD35.guide()))


def test_a_conditioning_without_pooled_text_is_refused() -> None:
    positive, _ = PROMPTS
    with pytest.raises(GuideError, match="the negative conditioning has no pooled text"):
        draw_comfyui(SD35.guided(), positive, [[SD35.prompt(2).embeds, {"pooled_output": None}]], W)


# -- conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_noise_levels_are_shifted_as_much(kind: MMDiTKind) -> None:
    assert kind.loaded.model.model_sampling.shift == kind.shift


def test_heads_of_another_width_are_refused() -> None:
    made = SD3Transformer2DModel(
        **SD3.diffusers | {"attention_head_dim": 32, "caption_projection_dim": 64}
    )
    with pytest.raises(ConversionError, match=r"attention_head_dim=32 \(ComfyUI: 64\)"):
        convert(made)
