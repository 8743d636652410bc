"""What a guide does to a sampling in ComfyUI, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.samplers
import comfy.sd
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from pilotfish_comfyui.loading import apply_guide
from unets import (
    SD2,
    SD15,
    SDXL,
    SIDE,
    WIDTH,
    Kind,
    Prompt,
    comfyui_model,
    comfyui_weights,
    draw_comfyui,
    on_comfyui,
    randomise,
    tiny_guide,
)

from pilotfish.interface import GuideError

POSITIVE, NEGATIVE = Prompt.random(1).conditioning(), Prompt.random(2).conditioning()
AREAS = [{"area": (SIDE, SIDE // 2, 0, SIDE // 2 * i)} for i in range(2)]
HALF = (torch.arange(SIDE) < SIDE // 2).float().expand(1, SIDE, SIDE)
MASKS = [{"mask": mask, "set_area_to_bounds": False} for mask in (HALF, 1 - HALF)]


def guided(kind: Kind = SD15, refresh: int = 0, **settings: Any) -> Any:
    return apply_guide(comfyui_model(kind), on_comfyui(tiny_guide(kind, **settings)), refresh)


def count_rows(model: Any) -> tuple[Any, list[int]]:
    """A clone that notes the images of every denoiser call, and its list."""
    rows: list[int] = []

    def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
        rows.append(len(given["input"]))
        return function(given["input"], given["timestep"], **given["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(call)
    return model, rows


@pytest.mark.parametrize(
    ("sampler", "refresh"), [("euler", 0), ("euler", 2), ("dpmpp_2m", 1), ("heun", 1)]
)
def test_the_passes_are_halved(sampler: str, refresh: int) -> None:
    plain, before = count_rows(comfyui_model(SD15))
    model, after = count_rows(guided(refresh=refresh))
    for each in (plain, model):
        draw_comfyui(each, POSITIVE, NEGATIVE, 4.0, n=2, sampler=sampler)
    calls = len(before)
    print(f"\n{sampler}, refresh={refresh}: {sum(before)} rows with CFG, {sum(after)} with a guide")
    assert before == calls * [4]
    assert sorted(after) == (calls - refresh) * [2] + refresh * [4]


@pytest.mark.parametrize(
    ("kind", "cfg"), [(SD15, 1.0), (SD15, 0.5), (SDXL, 1.0)], ids=lambda v: getattr(v, "name", v)
)
def test_no_guidance_is_plain_bit_for_bit(kind: Kind, cfg: float) -> None:
    plain = draw_comfyui(comfyui_model(kind), POSITIVE, NEGATIVE, cfg)
    assert torch.equal(draw_comfyui(guided(kind, refresh=1), POSITIVE, NEGATIVE, cfg), plain)


def test_the_scale_and_the_negative_prompt_are_live() -> None:
    model = guided()
    other = Prompt.random(3).conditioning()
    made = [
        draw_comfyui(model, POSITIVE, negative, cfg)
        for negative, cfg in ((NEGATIVE, 4.0), (NEGATIVE, 4.5), (other, 4.0))
    ]
    assert not torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_other_branches_are_untouched() -> None:
    model = comfyui_model(SDXL)
    plain = draw_comfyui(model, POSITIVE, NEGATIVE, 4.0)
    branch = apply_guide(model, on_comfyui(tiny_guide(SDXL)), 1)
    with_guide = draw_comfyui(branch, POSITIVE, NEGATIVE, 4.0)
    assert not torch.equal(with_guide, plain)
    for other in (model, model.clone()):
        assert torch.equal(draw_comfyui(other, POSITIVE, NEGATIVE, 4.0), plain)
    # a clone of the branch keeps the guide, as nodes after it make one
    assert torch.equal(draw_comfyui(branch.clone(), POSITIVE, NEGATIVE, 4.0), with_guide)
    assert branch.model is model.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_an_error_leaves_no_hooks() -> None:
    class Stop(Exception):
        pass

    def stop(*given: Any) -> None:
        raise Stop

    model = guided()
    model.set_model_unet_function_wrapper(stop)
    with pytest.raises(Stop):
        draw_comfyui(model, POSITIVE, NEGATIVE, 4.0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def test_its_weights_are_under_memory_management() -> None:
    """ComfyUI loads and unloads them with the model."""
    model, found = guided(), []

    def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
        held = comfy.model_management.loaded_models(only_currently_used=True)
        found.extend(id(patcher.model) for patcher in held if patcher)
        return function(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(call)
    draw_comfyui(model, POSITIVE, NEGATIVE, 4.0, steps=1)
    (weights,) = model.get_nested_additional_models()
    assert {id(model.model), id(weights.model)} <= set(found)
    assert weights.model_size() == sum(p.nbytes for p in weights.model.parameters())


# -- LoRA, ControlNet, areas --------------------------------------------------------------------


def low_rank() -> tuple[Any, torch.Tensor]:
    """A LoRA on the values of one cross-attention, and the change of its weight."""
    generator = torch.Generator().manual_seed(7)
    down, up = (0.2 * torch.randn(*size, generator=generator) for size in ((4, WIDTH), (32, 4)))
    name = "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_v"
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, up @ down


def with_lora(model: Any) -> Any:
    return comfy.sd.load_lora_for_models(model, None, low_rank()[0], 1.0, 0.0)[0]


def test_lora() -> None:
    """As ComfyUI loads it, after the guide or before: that of merged weights."""
    weights = on_comfyui(tiny_guide(SD15))
    made = [
        draw_comfyui(model, POSITIVE, NEGATIVE, 4.0)
        for model in (
            with_lora(apply_guide(comfyui_model(SD15), weights, 1)),
            apply_guide(with_lora(comfyui_model(SD15)), weights, 1),
        )
    ]
    plain = draw_comfyui(guided(refresh=1), POSITIVE, NEGATIVE, 4.0)
    layer = comfyui_weights(SD15).diffusion_model.output_blocks[5][1].transformer_blocks[0].attn2
    before = layer.to_v.weight.clone()
    layer.to_v.weight.add_(low_rank()[1])
    try:
        merged = draw_comfyui(guided(refresh=1), POSITIVE, NEGATIVE, 4.0)
    finally:
        layer.to_v.weight.copy_(before)
    assert torch.equal(*made)
    assert torch.equal(made[0], merged)
    assert not torch.allclose(merged, plain, atol=1e-2)


def test_low_vram(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that ComfyUI fetches layer by layer, with a LoRA that it adds then."""
    model, load = with_lora(guided(refresh=1)), ModelPatcher.load
    usual = draw_comfyui(model, POSITIVE, NEGATIVE, 4.0)
    comfy.model_management.unload_all_models()

    def partially(self: Any, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(self, device_to, lowvram_model_memory=1)

    monkeypatch.setattr(ModelPatcher, "load", partially)
    made = draw_comfyui(model, POSITIVE, NEGATIVE, 4.0)
    assert model.model.model_lowvram
    comfy.model_management.unload_all_models()
    assert torch.allclose(made, usual, atol=1e-4)


def test_controlnet() -> None:
    """It runs for the prompt alone; refreshed in all steps the result is CFG's with it."""
    config = {k: v for k, v in SD15.comfyui.items() if k not in ("out_channels", "legacy")}
    net = comfy.cldm.cldm.ControlNet(**config, num_heads=8, hint_channels=3)
    for parameter in net.parameters():  # ComfyUI leaves them as the memory was
        parameter.data.zero_()
    randomise(net, 0.2)
    rows: list[int] = []
    net.register_forward_hook(lambda net, args, kwargs, _: rows.append(len(kwargs["x"])),
                              with_kwargs=True)  # fmt: skip
    control = comfy.controlnet.ControlNet(net, load_device=torch.device("cpu"))
    image = torch.rand(1, 8 * SIDE, 8 * SIDE, 3, generator=torch.Generator().manual_seed(2))
    both = nodes.ControlNetApplyAdvanced().apply_controlnet(
        POSITIVE, NEGATIVE, control, image, 1.0, 0.0, 1.0
    )
    cfg = draw_comfyui(comfyui_model(SD15), *both, 4.0)
    assert rows == [2] * 4
    rows.clear()
    made = draw_comfyui(guided(), *both, 4.0)
    assert rows == [1] * 4
    without = draw_comfyui(guided(), POSITIVE, NEGATIVE, 4.0)
    assert not torch.allclose(made, without, atol=1e-2)
    assert torch.equal(draw_comfyui(guided(refresh=4), *both, 4.0), cfg)


def test_inpainting_and_image_to_image() -> None:
    """With a mask from a given image: refreshed in all steps the result is CFG's, and a fresh guide
    is the conditional model, bit for bit."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    mask = torch.ones(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 0
    given = {"image": image, "mask": mask}
    fresh = apply_guide(comfyui_model(SD15), on_comfyui(tiny_guide(SD15, untrained=True)), 0)
    for model, cfg in ((guided(refresh=4), 4.0), (fresh, 1.0)):
        plain = draw_comfyui(comfyui_model(SD15), POSITIVE, NEGATIVE, cfg, **given)
        assert torch.equal(draw_comfyui(model, POSITIVE, NEGATIVE, 4.0, **given), plain)
    made = draw_comfyui(guided(), POSITIVE, NEGATIVE, 4.0, **given)
    kept = comfyui_model(SD15).model.process_latent_in(image)[..., : SIDE // 2]
    assert torch.allclose(made[..., : SIDE // 2], kept, atol=1e-4)
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("sides", [AREAS, MASKS], ids=["areas", "masks"])
def test_two_prompts_side_by_side(sides: list[dict[str, Any]]) -> None:
    """Each is guided, in one pass."""
    areas = [*Prompt.random(1).conditioning(**sides[0]), *Prompt.random(3).conditioning(**sides[1])]
    model, rows = count_rows(guided())
    made = draw_comfyui(model, areas, NEGATIVE, 4.0)
    assert rows == [2] * 4
    assert torch.isfinite(made).all()
    left = draw_comfyui(guided(), POSITIVE, NEGATIVE, 4.0)
    assert not torch.allclose(made[..., : SIDE // 2], left[..., : SIDE // 2])
    fresh = apply_guide(comfyui_model(SD15), on_comfyui(tiny_guide(SD15, untrained=True)), 0)
    conditional = draw_comfyui(comfyui_model(SD15), areas, NEGATIVE, 1.0)
    assert torch.equal(draw_comfyui(fresh, areas, NEGATIVE, 4.0), conditional)


def test_prompts_of_two_lengths() -> None:
    """As long as ComfyUI makes both in one batch: with the shorter repeated."""
    longer = Prompt.random(1, tokens=14)
    shorter = Prompt.random(2, tokens=7)
    twice = Prompt(shorter.embeds.repeat(1, 2, 1), shorter.pooled)
    a, b = (
        draw_comfyui(guided(refresh=1), longer.conditioning(), each.conditioning(), 4.0)
        for each in (shorter, twice)
    )
    assert torch.allclose(a, b, atol=1e-4)


def test_prompts_for_a_part_of_the_steps() -> None:
    """A negative prompt that changes halfway reaches the guide when it does, and what a refresh
    found with the first is forgotten then."""
    halves = [
        *Prompt.random(2).conditioning(start_percent=0.0, end_percent=0.5),
        *Prompt.random(3).conditioning(start_percent=0.5, end_percent=1.0),
    ]
    known: list[bool] = []

    def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
        sampling = given["c"]["transformer_options"]["pilotfish"]
        known.append(sampling.guided.refresh is not None)
        return function(given["input"], given["timestep"], **given["c"])

    model = guided(refresh=1)
    model.set_model_unet_function_wrapper(call)
    made = draw_comfyui(model, POSITIVE, halves, 4.0)
    assert known == [False, False, False, False]  # the refresh is the second step
    for whole in (NEGATIVE, Prompt.random(3).conditioning()):
        known.clear()
        assert not torch.allclose(made, draw_comfyui(model, POSITIVE, whole, 4.0))
        assert known == [False, False, True, True]


# -- what is refused ----------------------------------------------------------------------------


def test_a_wrong_base_is_refused_with_both_names() -> None:
    with pytest.raises(GuideError, match=r"trained on small base, used on SDXL in ComfyUI"):
        apply_guide(comfyui_model(SDXL), on_comfyui(tiny_guide(SD15)))


def test_another_prediction_type_is_refused() -> None:
    weights = on_comfyui(tiny_guide(SD2))
    model = comfyui_model(SD2)
    model.add_object_patch("model_sampling", comfyui_weights(SD15).model_sampling)
    with pytest.raises(GuideError, match="prediction_type: guide v_prediction, denoiser epsilon"):
        apply_guide(model, weights)


def test_two_guides_are_refused() -> None:
    with pytest.raises(GuideError, match="has a guide already"):
        apply_guide(guided(), on_comfyui(tiny_guide(SD15)))


def test_two_negative_prompts_at_once_are_refused() -> None:
    two = [*NEGATIVE, *Prompt.random(3).conditioning()]
    with pytest.raises(GuideError, match="2 different negative conditionings"):
        draw_comfyui(guided(), POSITIVE, two, 4.0)


def test_areas_with_refreshes_are_refused() -> None:
    areas = [*POSITIVE, *Prompt.random(3).conditioning(**AREAS[0])]
    with pytest.raises(GuideError, match="set refresh to 0"):
        draw_comfyui(guided(refresh=1), areas, NEGATIVE, 4.0)


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "res_multistep_cfg_pp"])
def test_cfg_pp_is_refused(sampler: str) -> None:
    with pytest.raises(GuideError, match="needs the unconditional prediction"):
        draw_comfyui(guided(), POSITIVE, NEGATIVE, 4.0, sampler=sampler)


def test_a_further_pass_is_refused() -> None:
    def perturbed(args: dict[str, Any]) -> Any:
        given = (args["model"], [args["cond"]], args["input"], args["sigma"])
        (other,) = comfy.samplers.calc_cond_batch(*given, args["model_options"])
        return args["denoised"] - other

    model = guided()
    model.set_model_sampler_post_cfg_function(perturbed)
    with pytest.raises(GuideError, match="a further pass"):
        draw_comfyui(model, POSITIVE, NEGATIVE, 4.0)


def test_patches_of_the_cross_attention_are_refused() -> None:
    model = comfyui_model(SD15)
    model.set_model_attn2_replace(lambda q, k, v, options: q, "output", 5)
    with pytest.raises(GuideError, match="cross-attention"):
        apply_guide(model, on_comfyui(tiny_guide(SD15)))


def test_a_guider_with_passes_of_its_own_is_refused() -> None:
    class Other(comfy.samplers.CFGGuider):
        def predict_noise(self, *args: Any, **kwargs: Any) -> Any:
            return super().predict_noise(*args, **kwargs)

    model = guided()
    with pytest.raises(GuideError, match="Other runs passes of its own"):
        draw_comfyui(model, POSITIVE, NEGATIVE, 4.0, guider=Other(model))
