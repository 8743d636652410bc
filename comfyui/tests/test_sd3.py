"""Stable Diffusion 3 in ComfyUI draws what diffusers draws, from one noise and two prompts."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.cldm.mmdit
import comfy.controlnet
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy_extras.nodes_model_advanced
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from diffusers import SD3Transformer2DModel
from mmdits import (
    BUNDLED,
    KINDS,
    SD3,
    SD35,
    SIDE,
    TRAINED,
    Kind,
    bundled_guide,
    bundled_pipeline,
    bundled_prompts,
    comfyui_model,
    draw_comfyui,
    draw_diffusers,
    loaded,
    pipeline,
    prompt,
    tiny_guide,
    transformer,
)
from pilotfish_comfyui.convert import PREFIX, ConversionError, convert
from pilotfish_comfyui.fitting import backbone_of
from pilotfish_comfyui.loading import apply_guide
from test_same_latents import report
from test_sampling import AREAS, count_rows
from unets import CPU, SD15, on_comfyui, randomise
from unets import comfyui_model as comfyui_unet
from unets import tiny_guide as guide_for_unet

from pilotfish.backbones import Backbone
from pilotfish.interface import GuideError

STEPS, W = 4, 4.0
PARTS = ("text", "attention", "text attention", "modulation", "layers", "head")
BOUND = 1e-4
"""Largest difference of latents of up to 10, in float32: sums are in another order."""


def given(kind: Kind, n: int = 1) -> tuple[Any, Any]:
    """ComfyUI's conditionings of prompt and negative prompt."""
    return prompt(kind, 5, n).conditioning(), prompt(kind, 2).conditioning()


def draw_both(kind: Kind, guide: Any, refresh: int = 0, w: float = W, n: int = 1) -> Any:
    """The latents of diffusers and of ComfyUI."""
    model, prompts = comfyui_model(kind), (prompt(kind, 5, n), prompt(kind, 2))
    if guide is None:
        theirs = draw_diffusers(pipeline(kind), *prompts, w, STEPS, n)
        return theirs, draw_comfyui(model, *given(kind, n), w, STEPS, n)
    with guide.attached(pipeline(kind), refresh=refresh) as pipe:
        theirs = draw_diffusers(pipe, *prompts, w, STEPS, n)
    model = apply_guide(model, on_comfyui(guide), refresh)
    return theirs, draw_comfyui(model, *given(kind, n), w, STEPS, n)


@cache
def plain(kind: Kind, w: float) -> Any:
    """The same without a guide."""
    return draw_both(kind, None, w=w)


def guided(kind: Kind = SD35, refresh: int = 0, **settings: Any) -> Any:
    return apply_guide(comfyui_model(kind), on_comfyui(tiny_guide(kind, **settings)), refresh)


# -- the same latents -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("w", [1.0, W])
def test_without_guide(kind: Kind, w: float) -> None:
    assert report(f"{kind.name}, w={w:g}", *plain(kind, w)) < BOUND


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("refresh", [0, 2])
def test_guided(kind: Kind, refresh: int) -> None:
    theirs, ours = draw_both(kind, tiny_guide(kind), refresh)
    cfg, _ = plain(kind, W)
    assert report(f"{kind.name}, guided, refresh={refresh}", theirs, ours) < BOUND
    assert (theirs - cfg).abs().max() > 20 * BOUND


@pytest.mark.parametrize("kind", [BUNDLED, SD35], ids=lambda kind: kind.name)
@pytest.mark.parametrize("part", PARTS)
def test_each_part_of_the_guide(kind: Kind, part: str) -> None:
    """A guide of one part: all others are left out. Attention has two forms."""
    settings = {"text": False, "attention": False, "modulation": False, "rank": 0, "head": 0}
    alone = {
        "layers": {"rank": 4}, "head": {"head": 12},
        "text attention": {"attention": True, "joint_attention": "text"},
    }  # fmt: skip
    settings |= alone.get(part, {part: True})
    theirs, ours = draw_both(kind, tiny_guide(kind, **settings, uncond_templates=0))
    conditional, _ = plain(kind, 1.0)
    assert report(f"{kind.name}, {part} alone", theirs, ours) < BOUND
    assert (theirs - conditional).abs().max() > 20 * BOUND


def test_a_batch_with_one_negative_prompt() -> None:
    theirs, ours = draw_both(SD35, tiny_guide(SD35), refresh=1, n=2)
    assert report("SD 3.5 medium, two images", theirs, ours) < BOUND


def test_a_guide_for_few_steps() -> None:
    """It adds to the prediction of a step with both passes, too."""
    guide = tiny_guide(SD3, times=(1.0, 0.858, 0.602, 0.009))
    assert guide.corrects_refresh
    theirs, ours = draw_both(SD3, guide, refresh=2)
    without, _ = draw_both(SD3, tiny_guide(SD3), refresh=2)
    assert report("SD 3, guide for few steps, refresh=2", theirs, ours) < BOUND
    assert (theirs - without).abs().max() > 20 * BOUND


def test_the_bundled_model() -> None:
    """With its own weights, text encoders and guide where they are there, and else random ones."""
    pipe = bundled_pipeline()
    guide, prompts = bundled_guide(pipe), bundled_prompts(pipe)
    what = f"bundled ({'trained' if TRAINED.is_dir() else 'random weights'}), "
    conditionings, loading = [p.conditioning() for p in prompts], loaded(pipe.transformer)
    model, rows = count_rows(loading)
    for w in (1.0, W):
        rows.clear()
        theirs = draw_diffusers(pipe, *prompts, w, STEPS)
        made = draw_comfyui(model, *conditionings, w, STEPS)
        assert report(f"{what}w={w:g}", theirs, made) < BOUND
    assert rows == STEPS * [2]
    for refresh in (2, 0):
        model, rows = count_rows(apply_guide(loading, on_comfyui(guide), refresh))
        with guide.attached(pipe, refresh=refresh):
            theirs = draw_diffusers(pipe, *prompts, W, STEPS)
        made = draw_comfyui(model, *conditionings, W, STEPS)
        assert report(f"{what}guided, refresh={refresh}", theirs, made) < BOUND
    print(f"{2 * STEPS} denoiser passes with CFG, {sum(rows)} with the guide")
    assert rows == STEPS * [1]
    scale = pipe.vae.config.scaling_factor
    with torch.inference_mode():
        images = [pipe.vae.decode(latents / scale).sample for latents in (theirs, made)]
    report(f"{what}guided, images", *images)
    assert torch.allclose(*images, atol=2 / 255)


# -- what is left alone ---------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "refresh"), [("euler", 2), ("dpmpp_2m", 0)])
def test_the_passes_are_halved(sampler: str, refresh: int) -> None:
    model, rows = count_rows(guided(refresh=refresh))
    draw_comfyui(model, *given(SD35), W, n=2, sampler=sampler)
    assert sorted(rows) == (STEPS - refresh) * [2] + refresh * [4]


@pytest.mark.parametrize("cfg", [1.0, 0.5])
def test_no_guidance_is_plain_bit_for_bit(cfg: float) -> None:
    expected = draw_comfyui(comfyui_model(SD35), *given(SD35), cfg)
    assert torch.equal(draw_comfyui(guided(refresh=1), *given(SD35), cfg), expected)


def test_refreshed_in_all_steps_it_is_cfg_bit_for_bit() -> None:
    expected = draw_comfyui(comfyui_model(SD35), *given(SD35), W)
    assert torch.equal(draw_comfyui(guided(refresh=STEPS), *given(SD35), W), expected)


def test_other_branches_are_untouched() -> None:
    model = comfyui_model(SD35)
    expected = draw_comfyui(model, *given(SD35), W)
    branch = apply_guide(model, on_comfyui(tiny_guide(SD35)), 1)
    assert not torch.equal(draw_comfyui(branch, *given(SD35), W), expected)
    for other in (model, model.clone()):
        assert torch.equal(draw_comfyui(other, *given(SD35), W), expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_the_scale_and_the_negative_prompt_are_live() -> None:
    model, (positive, negative) = guided(), given(SD35)
    made = draw_comfyui(model, positive, negative, W)
    assert not torch.equal(draw_comfyui(model, positive, negative, W + 0.5), made)
    other = prompt(SD35, 3).conditioning()
    assert not torch.equal(draw_comfyui(model, positive, other, W), made)


@pytest.mark.parametrize("joint_attention", ["whole", "text"])
def test_a_fresh_guide_is_conditional_bit_for_bit_in_half_precision(joint_attention: Any) -> None:
    tensors = convert(transformer(SD35))
    options = {"dtype": torch.bfloat16}
    model = comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options)
    conditional = draw_comfyui(model, *given(SD35, 2), 1.0, n=2)
    guide = tiny_guide(SD35, untrained=True, joint_attention=joint_attention)
    made = draw_comfyui(apply_guide(model, on_comfyui(guide), 0), *given(SD35, 2), W, n=2)
    assert torch.equal(made, conditional)


def low_rank(kind: Kind) -> dict[str, torch.Tensor]:
    """A LoRA on the image's values of the second block, with diffusers' names."""
    generator, width = torch.Generator().manual_seed(7), transformer(kind).inner_dim
    name = "transformer.transformer_blocks.1.attn.to_v"
    return {
        f"{name}.lora_A.weight": 0.2 * torch.randn(4, width, generator=generator),
        f"{name}.lora_B.weight": 0.2 * torch.randn(width, 4, generator=generator),
    }


def test_lora_and_low_vram(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA as ComfyUI loads it, after the guide or before; and with weights that ComfyUI fetches
    layer by layer."""

    def with_lora(model: Any) -> Any:
        return comfy.sd.load_lora_for_models(model, None, low_rank(SD35), 1.0, 0.0)[0]

    model, load = with_lora(guided(refresh=1)), ModelPatcher.load
    made = draw_comfyui(model, *given(SD35), W)
    before = apply_guide(with_lora(comfyui_model(SD35)), on_comfyui(tiny_guide(SD35)), 1)
    assert torch.equal(draw_comfyui(before, *given(SD35), W), made)
    without = draw_comfyui(guided(refresh=1), *given(SD35), W)
    assert not torch.allclose(made, without, atol=20 * BOUND)
    comfy.model_management.unload_all_models()

    def partially(self: Any, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(self, device_to, lowvram_model_memory=1)

    monkeypatch.setattr(ModelPatcher, "load", partially)
    fetched = draw_comfyui(model, *given(SD35), W)
    assert model.model.model_lowvram
    comfy.model_management.unload_all_models()
    assert torch.allclose(fetched, made, atol=BOUND)


def test_controlnet() -> None:
    """It runs for the prompt alone; refreshed in all steps the result is CFG's with it."""
    config = comfyui_model(SD35).model.model_config.unet_config
    net = comfy.cldm.mmdit.ControlNet(
        **config, num_blocks=2, control_latent_channels=3, operations=comfy.ops.manual_cast
    )
    for tensor in net.state_dict().values():  # ComfyUI leaves them as the memory was
        tensor.zero_()
    rows: list[int] = []
    net.register_forward_hook(lambda net, args, kwargs, _: rows.append(len(kwargs["x"])),
                              with_kwargs=True)  # fmt: skip
    control = comfy.controlnet.ControlNet(randomise(net, 0.1), load_device=CPU, compression_ratio=1)
    image = torch.rand(1, SIDE, SIDE, 3, generator=torch.Generator().manual_seed(2))
    both = nodes.ControlNetApplyAdvanced().apply_controlnet(
        *given(SD35), control, image, 1.0, 0.0, 1.0
    )
    cfg = draw_comfyui(comfyui_model(SD35), *both, W)
    assert rows == [2] * STEPS
    rows.clear()
    made = draw_comfyui(guided(), *both, W)
    assert rows == [1] * STEPS
    without = draw_comfyui(guided(), *given(SD35), W)
    assert not torch.allclose(made, without, atol=20 * BOUND)
    assert torch.equal(draw_comfyui(guided(refresh=STEPS), *both, W), cfg)


def test_two_prompts_side_by_side() -> None:
    """Each is guided in its area, in one pass."""
    (_, negative) = given(SD35)
    areas = [
        *prompt(SD35, 5).conditioning(**AREAS[0]), *prompt(SD35, 3).conditioning(**AREAS[1])
    ]  # fmt: skip
    model, rows = count_rows(guided())
    made = draw_comfyui(model, areas, negative, W)
    assert rows == [2] * STEPS
    conditional = draw_comfyui(comfyui_model(SD35), areas, negative, 1.0)
    assert not torch.allclose(made, conditional, atol=20 * BOUND)
    fresh = apply_guide(comfyui_model(SD35), on_comfyui(tiny_guide(SD35, untrained=True)), 0)
    assert torch.equal(draw_comfyui(fresh, areas, negative, W), conditional)


def test_prompts_of_two_lengths() -> None:
    """They are left as they are: the tokens attend to each other, so a repeated prompt is another
    one. Refreshed in all steps the result is CFG's."""
    prompts = prompt(SD35, 5, tokens=12).conditioning(), prompt(SD35, 2).conditioning()
    expected = draw_comfyui(comfyui_model(SD35), *prompts, W)
    assert torch.equal(draw_comfyui(guided(refresh=STEPS), *prompts, W), expected)
    for joint_attention in ("whole", "text"):
        made = draw_comfyui(guided(refresh=1, joint_attention=joint_attention), *prompts, W)
        assert torch.isfinite(made).all()
        assert not torch.allclose(made, expected, atol=20 * BOUND)


def test_latents_that_the_patches_do_not_divide() -> None:
    """ComfyUI pads them."""
    for refresh, guide in ((0, tiny_guide(SD35)), (2, tiny_guide(SD35, times=(0.9, 0.8, 0.5, 0)))):
        model = apply_guide(comfyui_model(SD35), on_comfyui(guide), refresh)
        made = draw_comfyui(model, *given(SD35), W, shape=(7, 5))
        assert made.shape[-2:] == (7, 5)
        assert torch.isfinite(made).all()


def test_a_shift_of_the_noise_levels() -> None:
    """*ModelSamplingSD3* changes the steps, and the guide is on the model before or after it."""
    node = comfy_extras.nodes_model_advanced.ModelSamplingSD3()
    (before,) = node.patch(guided(), 5.0)
    after = apply_guide(node.patch(comfyui_model(SD35), 5.0)[0], on_comfyui(tiny_guide(SD35)), 0)
    made = draw_comfyui(before, *given(SD35), W)
    assert torch.equal(draw_comfyui(after, *given(SD35), W), made)
    assert not torch.allclose(draw_comfyui(guided(), *given(SD35), W), made, atol=20 * BOUND)


# -- what is refused ------------------------------------------------------------------------------


def test_a_guide_of_another_family_is_refused_with_both_names() -> None:
    with pytest.raises(GuideError, match=r"trained on small base, used on SD3 in ComfyUI"):
        apply_guide(comfyui_model(SD35), on_comfyui(guide_for_unet(SD15)))
    with pytest.raises(GuideError, match=r"trained on small base, used on BaseModel in ComfyUI"):
        apply_guide(comfyui_unet(SD15), on_comfyui(tiny_guide(SD35)))


def test_a_guide_of_another_transformer_is_refused() -> None:
    with pytest.raises(GuideError, match="trained on small base, used on SD3 in ComfyUI"):
        apply_guide(comfyui_model(SD3), on_comfyui(tiny_guide(SD35)))


def test_a_patch_that_replaces_blocks_is_refused() -> None:
    model = comfyui_model(SD35)
    model.set_model_patch_replace(lambda given, more: given, "dit", "double_block", 1)
    with pytest.raises(GuideError, match="replaces blocks of the transformer"):
        apply_guide(model, on_comfyui(tiny_guide(SD35)))


def test_a_conditioning_without_pooled_text_is_refused() -> None:
    positive, _ = given(SD35)
    with pytest.raises(GuideError, match="the negative conditioning has no pooled text"):
        draw_comfyui(guided(), positive, [[prompt(SD35, 2).embeds, {"pooled_output": None}]], W)


# -- conversion -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_signature_and_tensors_are_the_same(kind: Kind) -> None:
    ours = comfyui_model(kind).model
    signature = Backbone.of(transformer(kind)).signature("flow")
    assert backbone_of(ours).signature("flow") == signature
    converted = convert(transformer(kind))
    found = ours.diffusion_model.state_dict()
    assert converted.keys() == {PREFIX + name for name in found}
    assert all(torch.equal(converted[PREFIX + name], found[name]) for name in found)
    assert ours.model_sampling.shift == kind.shift


def test_heads_of_another_width_are_refused() -> None:
    made = SD3Transformer2DModel(
        **SD3.config | {"attention_head_dim": 32, "caption_projection_dim": 64}
    )
    with pytest.raises(ConversionError, match=r"attention_head_dim=32 \(ComfyUI: 64\)"):
        convert(made)
