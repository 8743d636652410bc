"""What a guide does to a sampling in ComfyUI, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy.sd
import nodes
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from kinds import SIDE, STEPS, Kind, Prompt, W, count_rows, draw_comfyui, on_comfyui
from mmdits import SD3, SD35
from pilotfish_comfyui.fitting import backbone_of
from pilotfish_comfyui.loading import apply_guide
from unets import SD2, SD15, SDXL

from pilotfish.interface import GuideError

POSITIVE, NEGATIVE = SD15.conditionings()
AREAS = [{"area": (SIDE, SIDE // 2, 0, SIDE // 2 * i)} for i in range(2)]
HALF = (torch.arange(SIDE) < SIDE // 2).float().expand(1, SIDE, SIDE)
MASKS = [{"mask": mask, "set_area_to_bounds": False} for mask in (HALF, 1 - HALF)]


def has_hooks(model: Any) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())


def differ(kind: Kind, made: torch.Tensor, other: torch.Tensor) -> bool:
    """By far more than sums in another order do."""
    return not torch.allclose(made, other, atol=50 * kind.bound)


@pytest.mark.parametrize(
    ("kind", "sampler", "refresh"),
    [
        (SD15, "euler", 0), (SD15, "euler", 2), (SD15, "dpmpp_2m", 1), (SD15, "heun", 1),
        (SD35, "euler", 2), (SD35, "dpmpp_2m", 0),
    ],
)  # fmt: skip
def test_the_passes_are_halved(kind: Kind, sampler: str, refresh: int) -> None:
    plain, before = count_rows(kind.model())
    model, after = count_rows(kind.guided(refresh))
    for each in (plain, model):
        draw_comfyui(each, *kind.conditionings(), W, n=2, sampler=sampler)
    calls = len(before)
    print(f"\n{kind.name}, {sampler}, refresh={refresh}: {sum(before)} rows with CFG, {sum(after)}")
    assert before == calls * [4]
    assert sorted(after) == (calls - refresh) * [2] + refresh * [4]


@pytest.mark.parametrize(
    ("kind", "cfg"), [(SD15, 1.0), (SD15, 0.5), (SDXL, 1.0), (SD35, 1.0), (SD35, 0.5)]
)
def test_no_guidance_is_plain_bit_for_bit(kind: Kind, cfg: float) -> None:
    plain, made = (
        draw_comfyui(model, *kind.conditionings(), cfg) for model in (kind.model(), kind.guided(1))
    )
    assert torch.equal(made, plain)


@pytest.mark.parametrize("kind", [SD15, SD35])
def test_refreshed_in_all_steps_it_is_cfg_bit_for_bit(kind: Kind) -> None:
    cfg, made = (
        draw_comfyui(model, *kind.conditionings(), W)
        for model in (kind.model(), kind.guided(refresh=STEPS))
    )
    assert torch.equal(made, cfg)


@pytest.mark.parametrize(
    ("kind", "joint_attention"), [(SD15, "whole"), (SD35, "whole"), (SD35, "sampled")]
)
def test_a_fresh_guide_is_conditional_bit_for_bit_in_half_precision(
    kind: Kind, joint_attention: str
) -> None:
    model, prompts = kind.load(torch.bfloat16), kind.conditionings(2)

    def draw(untrained: bool, on: Any, refresh: int) -> torch.Tensor:
        guide = kind.guide(untrained, joint_attention=joint_attention)
        return draw_comfyui(apply_guide(on, on_comfyui(guide), refresh), *prompts, W, n=2)

    conditional = draw_comfyui(model, *prompts, 1.0, n=2)
    assert torch.equal(draw(True, model, 0), conditional)
    trained, single = draw(False, model, 1), draw(False, kind.model(), 1)
    assert not torch.equal(trained, conditional)
    assert (trained - single).square().mean().sqrt() < 0.02 * trained.square().mean().sqrt()


@pytest.mark.parametrize("kind", [SD15, SD35])
def test_the_scale_and_the_negative_prompt_are_live(kind: Kind) -> None:
    model, (positive, negative) = kind.guided(), kind.conditionings()
    made = draw_comfyui(model, positive, negative, W)
    assert not torch.equal(draw_comfyui(model, positive, negative, W + 0.5), made)
    other = kind.prompt(3).conditioning()
    assert not torch.equal(draw_comfyui(model, positive, other, W), made)


@pytest.mark.parametrize("kind", [SDXL, SD35])
def test_other_branches_are_untouched(kind: Kind) -> None:
    model, prompts = kind.model(), kind.conditionings()
    plain = draw_comfyui(model, *prompts, W)
    branch = apply_guide(model, on_comfyui(kind.guide()), 1)
    guided = draw_comfyui(branch, *prompts, W)
    assert not torch.equal(guided, plain)
    for other in (model, model.clone()):
        assert torch.equal(draw_comfyui(other, *prompts, W), plain)
    # a clone of the branch keeps the guide, as nodes after it make one
    assert torch.equal(draw_comfyui(branch.clone(), *prompts, W), guided)
    assert branch.model is model.model
    assert not has_hooks(model)


def test_an_error_leaves_no_hooks() -> None:
    class Stop(Exception):
        pass

    def stop(*given: Any) -> None:
        raise Stop

    model = SD15.guided()
    model.set_model_unet_function_wrapper(stop)
    with pytest.raises(Stop):
        draw_comfyui(model, POSITIVE, NEGATIVE, W)
    assert not has_hooks(model)


def test_its_weights_are_under_memory_management() -> None:
    """ComfyUI loads and unloads them with the model."""
    model, found = SD15.guided(), []

    def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
        held = comfy.model_management.loaded_models(only_currently_used=True)
        found.extend(id(patcher.model) for patcher in held if patcher)
        return function(given["input"], given["timestep"], **given["c"])

    model.set_model_unet_function_wrapper(call)
    draw_comfyui(model, POSITIVE, NEGATIVE, W, steps=1)
    (weights,) = model.get_nested_additional_models()
    assert {id(model.model), id(weights.model)} <= set(found)
    assert weights.model_size() == sum(p.nbytes for p in weights.model.parameters())


# -- LoRA, ControlNet, areas --------------------------------------------------------------------


def with_lora(kind: Kind, model: Any) -> Any:
    return comfy.sd.load_lora_for_models(model, None, kind.lora()[0], 1.0, 0.0)[0]


@pytest.mark.parametrize("kind", [SD15, SD35])
def test_lora(kind: Kind) -> None:
    """As ComfyUI loads it, after the guide or before: that of merged weights."""
    prompts, guide = kind.conditionings(), on_comfyui(kind.guide())
    after = draw_comfyui(with_lora(kind, apply_guide(kind.model(), guide, 1)), *prompts, W)
    before = draw_comfyui(apply_guide(with_lora(kind, kind.model()), guide, 1), *prompts, W)
    plain = draw_comfyui(kind.guided(refresh=1), *prompts, W)
    _, weight, change = kind.lora()
    kept = weight.clone()
    with torch.no_grad():
        weight.add_(change)
        try:
            merged = draw_comfyui(kind.guided(refresh=1), *prompts, W)
        finally:
            weight.copy_(kept)
    assert torch.equal(after, before)
    assert torch.equal(after, merged)
    assert differ(kind, merged, plain)


@pytest.mark.parametrize("kind", [SD15, SD35])
def test_low_vram(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that ComfyUI fetches layer by layer, with a LoRA that it adds then."""
    model, load = with_lora(kind, kind.guided(refresh=1)), ModelPatcher.load
    usual = draw_comfyui(model, *kind.conditionings(), W)
    comfy.model_management.unload_all_models()

    def partially(self: Any, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        return load(self, device_to, lowvram_model_memory=1)

    monkeypatch.setattr(ModelPatcher, "load", partially)
    made = draw_comfyui(model, *kind.conditionings(), W)
    assert model.model.model_lowvram
    comfy.model_management.unload_all_models()
    assert torch.allclose(made, usual, atol=1e-4)


@pytest.mark.parametrize("kind", [SD15, SD35])
def test_controlnet(kind: Kind) -> None:
    """It runs for the prompt alone; refreshed in all steps the result is CFG's with it."""
    (control, side), rows = kind.control(), list[int]()
    control.control_model.register_forward_hook(
        lambda net, args, kwargs, _: rows.append(len(kwargs["x"])), with_kwargs=True
    )
    image = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(2))
    both = nodes.ControlNetApplyAdvanced().apply_controlnet(
        *kind.conditionings(), control, image, 1.0, 0.0, 1.0
    )
    cfg = draw_comfyui(kind.model(), *both, W)
    assert rows == [2] * STEPS
    rows.clear()
    made = draw_comfyui(kind.guided(), *both, W)
    assert rows == [1] * STEPS
    assert differ(kind, made, draw_comfyui(kind.guided(), *kind.conditionings(), W))
    assert torch.equal(draw_comfyui(kind.guided(refresh=STEPS), *both, W), cfg)


def test_inpainting_and_image_to_image() -> None:
    """With a mask from a given image: refreshed in all steps the result is CFG's, and a fresh guide
    is the conditional model, bit for bit."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(1, 4, SIDE, SIDE, generator=generator)
    mask = torch.ones(1, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 0
    given = {"image": image, "mask": mask}
    fresh = apply_guide(SD15.model(), on_comfyui(SD15.guide(untrained=True)), 0)
    for model, cfg in ((SD15.guided(refresh=STEPS), W), (fresh, 1.0)):
        plain = draw_comfyui(SD15.model(), POSITIVE, NEGATIVE, cfg, **given)
        assert torch.equal(draw_comfyui(model, POSITIVE, NEGATIVE, W, **given), plain)
    made = draw_comfyui(SD15.guided(), POSITIVE, NEGATIVE, W, **given)
    kept = SD15.model().model.process_latent_in(image)[..., : SIDE // 2]
    assert torch.allclose(made[..., : SIDE // 2], kept, atol=1e-4)
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("sides", [AREAS, MASKS], ids=["areas", "masks"])
@pytest.mark.parametrize("kind", [SD15, SD35])
def test_two_prompts_side_by_side(kind: Kind, sides: list[dict[str, Any]]) -> None:
    """Each is guided, in one pass."""
    positive, negative = kind.conditionings()
    left, right = sides
    areas = [*kind.prompt(5).conditioning(**left), *kind.prompt(3).conditioning(**right)]
    model, rows = count_rows(kind.guided())
    made = draw_comfyui(model, areas, negative, W)
    assert rows == [2] * STEPS
    assert torch.isfinite(made).all()
    whole = draw_comfyui(kind.guided(), positive, negative, W)
    assert not torch.allclose(made[..., : SIDE // 2], whole[..., : SIDE // 2])
    conditional = draw_comfyui(kind.model(), areas, negative, 1.0)
    assert differ(kind, made, conditional)
    fresh = apply_guide(kind.model(), on_comfyui(kind.guide(untrained=True)), 0)
    assert torch.equal(draw_comfyui(fresh, areas, negative, W), conditional)


def test_prompts_of_two_lengths() -> None:
    """As long as ComfyUI makes both in one batch: with the shorter repeated."""
    longer = SD15.prompt(1, tokens=14)
    shorter = SD15.prompt(2, tokens=7)
    twice = Prompt(shorter.embeds.repeat(1, 2, 1), shorter.pooled)
    a, b = (
        draw_comfyui(SD15.guided(refresh=1), longer.conditioning(), each.conditioning(), W)
        for each in (shorter, twice)
    )
    assert torch.allclose(a, b, atol=1e-4)


def test_prompts_for_a_part_of_the_steps() -> None:
    """A negative prompt that changes halfway reaches the guide when it does, and what a refresh
    found with the first is forgotten then."""
    halves = [
        *SD15.prompt(2).conditioning(start_percent=0.0, end_percent=0.5),
        *SD15.prompt(3).conditioning(start_percent=0.5, end_percent=1.0),
    ]
    known: list[bool] = []

    def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
        sampling = given["c"]["transformer_options"]["pilotfish"]
        known.append(sampling.guided.refresh is not None)
        return function(given["input"], given["timestep"], **given["c"])

    model = SD15.guided(refresh=1)
    model.set_model_unet_function_wrapper(call)
    made = draw_comfyui(model, POSITIVE, halves, W)
    assert known == [False, False, False, False]  # the refresh is the second step
    for whole in (NEGATIVE, SD15.prompt(3).conditioning()):
        known.clear()
        assert not torch.allclose(made, draw_comfyui(model, POSITIVE, whole, W))
        assert known == [False, False, True, True]


# -- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "of", "name"),
    [
        (SDXL, SD15, "SDXL"), (SD3, SD35, "SD3"),
        (SD35, SD15, "SD3"), (SD15, SD35, "BaseModel"),  # another family
    ],
)  # fmt: skip
def test_a_guide_of_another_base_is_refused_with_both_names(
    kind: Kind, of: Kind, name: str
) -> None:
    with pytest.raises(GuideError, match=f"trained on small base, used on {name} in ComfyUI"):
        apply_guide(kind.model(), on_comfyui(of.guide()))


@pytest.mark.parametrize(("kind", "of"), [(SD15, SD35), (SD3, SD35)])
def test_a_layer_that_is_missing_is_named(kind: Kind, of: Kind) -> None:
    model = kind.loaded.model
    net = type(model.diffusion_model).__name__
    with pytest.raises(GuideError, match=f"this {net} lacks a layer to which the guide adds: "):
        backbone_of(model).install(of.guide())
    assert not has_hooks(kind.loaded)


def test_another_prediction_type_is_refused() -> None:
    weights = on_comfyui(SD2.guide())
    model = SD2.model()
    model.add_object_patch("model_sampling", SD15.loaded.model.model_sampling)
    with pytest.raises(GuideError, match="prediction_type: guide v_prediction, denoiser epsilon"):
        apply_guide(model, weights)


def test_two_guides_are_refused() -> None:
    with pytest.raises(GuideError, match="has a guide already"):
        apply_guide(SD15.guided(), on_comfyui(SD15.guide()))


def test_two_negative_prompts_at_once_are_refused() -> None:
    two = [*NEGATIVE, *SD15.prompt(3).conditioning()]
    with pytest.raises(GuideError, match="2 different negative conditionings"):
        draw_comfyui(SD15.guided(), POSITIVE, two, W)


def test_areas_with_refreshes_are_refused() -> None:
    areas = [*POSITIVE, *SD15.prompt(3).conditioning(**AREAS[0])]
    with pytest.raises(GuideError, match="set refresh to 0"):
        draw_comfyui(SD15.guided(refresh=1), areas, NEGATIVE, W)


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "res_multistep_cfg_pp"])
def test_cfg_pp_is_refused(sampler: str) -> None:
    with pytest.raises(GuideError, match="needs the unconditional prediction"):
        draw_comfyui(SD15.guided(), POSITIVE, NEGATIVE, W, sampler=sampler)


def test_a_further_pass_is_refused() -> None:
    def perturbed(args: dict[str, Any]) -> Any:
        given = (args["model"], [args["cond"]], args["input"], args["sigma"])
        (other,) = comfy.samplers.calc_cond_batch(*given, args["model_options"])
        return args["denoised"] - other

    model = SD15.guided()
    model.set_model_sampler_post_cfg_function(perturbed)
    with pytest.raises(GuideError, match="a further pass"):
        draw_comfyui(model, POSITIVE, NEGATIVE, W)


def test_patches_of_the_cross_attention_are_refused() -> None:
    model = SD15.model()
    model.set_model_attn2_replace(lambda q, k, v, options: q, "output", 5)
    with pytest.raises(GuideError, match="cross-attention"):
        apply_guide(model, on_comfyui(SD15.guide()))


def test_a_guider_with_passes_of_its_own_is_refused() -> None:
    class Other(comfy.samplers.CFGGuider):
        def predict_noise(self, *args: Any, **kwargs: Any) -> Any:
            return super().predict_noise(*args, **kwargs)

    model = SD15.guided()
    with pytest.raises(GuideError, match="Other runs passes of its own"):
        draw_comfyui(model, POSITIVE, NEGATIVE, W, guider=Other(model))
