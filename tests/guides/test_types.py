"""The contract of every type of guide: shapes, zeros, what it depends on."""

from __future__ import annotations

from dataclasses import MISSING, fields, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from pilotfish.backbones import Backbone
from pilotfish.guides import ExternalGuide, FullGuide, Guide, TinyGuide
from pilotfish.guides.tiny import spread
from pilotfish.interface import GuideError, GuideInputs, GuideOutput, TextConditions
from tests import components


@pytest.fixture
def inputs() -> GuideInputs:
    """A batch of three."""
    family = components.FAMILIES["unet"]
    return GuideInputs(
        latents=family.latents(3, seed=13),
        time=torch.tensor([0.99, 0.5, 0.01]),
        guidance_scale=torch.tensor([2.0, 4.0, 7.5]),
        text=family.text(3, seed=14),
        negative=family.text(3, seed=15),
    )


def added(guide: Guide, inputs: GuideInputs) -> dict[str, torch.Tensor]:
    """All that a guide's output adds, to features that depend on their sample alone."""
    return tensors(guide(inputs), guide.config.signature, inputs.latents[:, :1])


def tensors(
    output: GuideOutput, signature: dict[str, Any], latents: torch.Tensor
) -> dict[str, torch.Tensor]:
    head = signature["head"]
    widths = {name: (c, c) for name, c in signature["layers"]}
    widths[head["module"]] = head["features"], head["channels"]
    found = dict(output.gains)
    if output.text is not None:
        found["text"] = output.text
    if output.text_gain is not None:
        found["text_gain"] = output.text_gain
    for name, residual in output.residuals.items():
        ramps = [torch.linspace(-1, 1, c)[:, None, None] for c in widths[name]]
        entered, made = (torch.sin(3 * latents + ramp) for ramp in ramps)
        found[name] = residual(entered, made) - made
    if output.encoder is not None:
        skips, middle = output.encoder
        found |= {f"skip {i}": skip for i, skip in enumerate(skips)} | {"middle": middle}
    return found


def differ(guide: Guide, inputs: GuideInputs, atol: float = 1e-6, **changed: Any) -> bool:
    with torch.no_grad():
        one, other = added(guide, inputs), added(guide, replace(inputs, **changed))
    return any(not torch.allclose(one[k], other[k], atol=atol) for k in one)


# -- every type --------------------------------------------------------------------------------


def test_an_output_fits_the_denoiser(trained: Guide, inputs: GuideInputs) -> None:
    output, signature = trained(inputs), trained.config.signature
    assert set(output.residuals) == set(trained.target_modules)
    assert set(output.gains) == set(trained.extrapolated)
    gains = {**dict(signature["attention"]), **dict.fromkeys(signature["modulation"], 1)}
    assert all(gain.shape == (3, gains[name]) for name, gain in output.gains.items())
    channels = dict(signature["layers"]) | {"conv_out": 4}
    for name, tensor in added(trained, inputs).items():
        if name in output.residuals:
            assert tensor.shape == (3, channels[name], 8, 8)
    if output.encoder is not None:
        skips, middle = output.encoder
        expected = [(3, c, 8 >> level, 8 >> level) for c, level in signature["encoder"]]
        assert [tuple(skip.shape) for skip in skips] == expected
        assert middle.shape == skips[-1].shape


def test_a_fresh_guide_adds_zeros(fresh: Guide, inputs: GuideInputs) -> None:
    assert not any(tensor.any() for tensor in added(fresh, inputs).values())


def test_scale_1_adds_zeros(trained: Guide, inputs: GuideInputs) -> None:
    scale = torch.tensor([1.0, 0.3, 4.0])
    for name, tensor in added(trained, replace(inputs, guidance_scale=scale)).items():
        assert not tensor[:2].any(), name
        assert tensor[2].any(), name


def test_scale_time_text_and_latents_count(trained: Guide, inputs: GuideInputs) -> None:
    for w in (2.25, 2.5, 7.0):
        assert differ(trained, inputs, guidance_scale=torch.full((3,), w))
    assert differ(trained, inputs, time=inputs.time - 0.007)
    assert differ(trained, inputs, text=inputs.text[torch.tensor([1, 2, 0])])
    assert differ(trained, inputs, latents=-inputs.latents)


def test_the_negative_prompt_counts_but_for_the_full_guide(
    trained: Guide, inputs: GuideInputs
) -> None:
    """The paper's full guide is a copy of the encoder, without an input for it."""
    other = inputs.negative[torch.tensor([1, 2, 0])]
    assert differ(trained, inputs, negative=other) is not isinstance(trained, FullGuide)


@pytest.mark.parametrize("kind", [TinyGuide, ExternalGuide])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_size_of_the_embeddings_does_not_count(
    kind: type[Guide], dtype: torch.dtype, unet: UNet2DConditionModel, inputs: GuideInputs
) -> None:
    """Text encoders differ in it by far; a guide from before was made without."""

    def larger(text: TextConditions) -> TextConditions:
        return TextConditions(300 * text.embeds)

    large = {"text": larger(inputs.text), "negative": larger(inputs.negative)}
    more = {"condition_on_negative": True} if kind is TinyGuide else {}
    for normalize in (True, False):
        guide = kind.for_denoiser(unet, "epsilon", normalize_text=normalize, **more)
        components.randomise(guide, seed=3)
        assert differ(guide, inputs, 1e-3, **large) is not normalize
        assert differ(guide, inputs, time=inputs.time.flip(0))
    zeros = TextConditions(torch.zeros_like(inputs.negative.embeds)).to(dtype)  # as SDXL has them
    condition = kind.for_denoiser(unet, "epsilon", **more).to(dtype).condition
    made = condition(inputs.time, inputs.guidance_scale, large["text"].to(dtype), zeros)
    assert made.isfinite().all()
    assert made.std(1).min() > 0.01  # not saturated


def test_samples_do_not_mix(trained: Guide, inputs: GuideInputs) -> None:
    with torch.no_grad():
        together = added(trained, inputs)
        for i in range(3):
            one = slice(i, i + 1)
            names = ("latents", "time", "guidance_scale", "text", "negative")
            alone = added(trained, replace(inputs, **{k: getattr(inputs, k)[one] for k in names}))
            for name, tensor in alone.items():
                torch.testing.assert_close(together[name][one], tensor, atol=1e-5, rtol=1e-4)


def test_one_negative_prompt_serves_all(trained: Guide, inputs: GuideInputs) -> None:
    one = inputs.negative[:1]
    with torch.no_grad():
        shared = added(trained, replace(inputs, negative=one))
        repeated = added(trained, replace(inputs, negative=one.expand(3)))
    for name, tensor in shared.items():
        torch.testing.assert_close(tensor, repeated[name], atol=1e-6, rtol=1e-5)


def test_every_parameter_has_a_gradient(fresh: Guide, trained: Guide, inputs: GuideInputs) -> None:
    """Several processes could not train a parameter that has none."""
    inputs = replace(inputs, refresh=components.refresh(inputs.latents))
    sum(tensor.square().sum() for tensor in added(trained, inputs).values()).backward()
    assert not [n for n, p in trained.named_parameters() if p.grad is None]


def test_settings_are_arguments_of_the_guide(
    guide_class: type[Guide], unet: UNet2DConditionModel
) -> None:
    settings = {f.name: f.default for f in fields(guide_class.settings_class)}
    assert MISSING not in settings.values()
    default = guide_class.for_denoiser(unet, "epsilon").settings()
    assert guide_class.for_denoiser(unet, "epsilon", **settings).settings() == default
    assert Guide.registry[guide_class.guide_type] is guide_class


def test_time_is_one_number_whatever_the_size_of_the_schedule(
    trained: Guide, unet: UNet2DConditionModel
) -> None:
    assert trained.times is None
    few = type(trained).for_denoiser(unet, "epsilon", times=[0.999, 0.499])
    assert few.times == (0.999, 0.499)


# -- the tiny guide ----------------------------------------------------------------------------

NO_PART: dict[str, Any] = {
    "text": False, "attention": False, "modulation": False, "rank": 0, "head": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"text": True}, {"text_gain"}),
        ({"attention": True}, {"attn2"}),
        ({"modulation": True}, {"resnets (gain)"}),
        ({"rank": 4, "layers": 8}, {"resnets", "attentions"}),
        ({"head": 4}, {"conv_out"}),
    ],
    ids=["text", "attention", "modulation", "layers", "head"],
)
def test_each_part_of_a_tiny_guide_alone(
    unet: UNet2DConditionModel, inputs: GuideInputs, settings: dict[str, Any], names: set[str]
) -> None:
    output = TinyGuide.for_denoiser(unet, "epsilon", **NO_PART | settings)(inputs)
    found = {"text_gain"} if output.text_gain is not None else set()
    found |= {"attn2" if n.endswith("attn2") else "resnets (gain)" for n in output.gains}
    found |= {"conv_out" if n == "conv_out" else n.split(".")[-2] for n in output.residuals}
    assert found == names
    assert output.encoder is None


@given(n=st.integers(1, 40), count=st.integers(1, 50))
def test_additions_are_spread_evenly_and_the_last_layer_has_one(n: int, count: int) -> None:
    chosen = spread(list(range(n)), count)
    assert len(chosen) == min(n, count)
    assert chosen[-1] == n - 1
    steps = {b - a for a, b in pairwise([-1, *chosen])}
    assert max(steps) - min(steps) <= 1


def test_a_tiny_guide_without_any_part_is_refused(unet: UNet2DConditionModel) -> None:
    with pytest.raises(GuideError, match="at least one of text, attention, modulation, rank"):
        TinyGuide.for_denoiser(unet, "epsilon", **NO_PART)


@pytest.mark.parametrize("missing", [{"condition_on_negative": False}, {"head": 0}])
def test_templates_without_what_they_need_are_refused(
    unet: UNet2DConditionModel, missing: dict[str, Any]
) -> None:
    whole = {"condition_on_negative": True, "uncond_templates": 2}
    TinyGuide.for_denoiser(unet, "epsilon", **whole)
    with pytest.raises(GuideError, match="uncond_templates needs"):
        TinyGuide.for_denoiser(unet, "epsilon", **whole | missing)


@pytest.mark.parametrize("size", [(8, 8), (4, 4), (16, 24)])
def test_templates_depend_on_the_negative_prompt_and_are_resized_to_the_latents(
    unet: UNet2DConditionModel, inputs: GuideInputs, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    guide = TinyGuide.for_denoiser(unet, "epsilon", condition_on_negative=True, uncond_templates=2)
    torch.nn.init.normal_(guide.templates.templates.weight)
    torch.nn.init.normal_(guide.condition.negative.weight)
    # of the negative prompt itself, and not by way of the condition
    torch.nn.init.zeros_(guide.templates.condition.weight)
    w = torch.tensor([2.0, 3.0, 3.0])
    at = replace(inputs, latents=torch.zeros(3, 4, *size), guidance_scale=w)
    features, prediction = torch.zeros(3, 8, *size), torch.zeros(3, 4, *size)

    def residual(**changed: Any) -> torch.Tensor:
        made: torch.Tensor = guide(replace(at, **changed)).residuals["conv_out"](
            features, prediction
        )
        return made

    one = residual()
    other = residual(negative=inputs.negative[torch.tensor([2, 1, 0])])
    assert one.shape == prediction.shape
    assert one.std((2, 3)).min() > 0
    assert not torch.allclose(one, other)
    condition = guide.condition(at.time, w, at.text, at.negative)
    template = guide.templates(guide.condition.of_negative(at.negative), condition)
    strength = (w - 1)[:, None]  # as in equation (1)
    if min(size) >= 8:  # the corners stay when it is enlarged
        torch.testing.assert_close(one[..., 0, 0], strength * template[..., 0, 0])
        torch.testing.assert_close(one[..., -1, -1], strength * template[..., -1, -1])


@pytest.mark.parametrize("condition_on_negative", [False, True])
def test_only_on_request_a_tiny_guide_is_conditioned_on_the_negative_prompt_itself(
    unet: UNet2DConditionModel, inputs: GuideInputs, condition_on_negative: bool
) -> None:
    """Otherwise only its difference to the prompt counts, which a common shift leaves alone."""
    guide = TinyGuide.for_denoiser(
        unet, "epsilon", condition_on_negative=condition_on_negative, normalize_text=False
    )  # the size of the prompt counts otherwise

    def condition(shift: float) -> torch.Tensor:
        texts = (TextConditions(t.embeds + shift) for t in (inputs.text, inputs.negative))
        made: torch.Tensor = guide.condition(inputs.time, inputs.guidance_scale, *texts)
        return made

    torch.testing.assert_close(condition(0.5), condition(0.0))  # a fresh one
    components.randomise(guide)
    same = torch.allclose(condition(0.5), condition(0.0), atol=1e-5)
    assert same is not condition_on_negative


# -- the paper's guides ------------------------------------------------------------------------


def test_the_full_guide_starts_from_a_copy_of_the_encoder(unet: UNet2DConditionModel) -> None:
    guide = FullGuide.for_denoiser(unet, "epsilon")
    base, copied = unet.state_dict(), guide.encoder.state_dict()
    assert any(name.startswith("down_blocks.1") for name in copied)
    assert not any(name.startswith(("up_blocks", "conv_out")) for name in copied)
    assert all(torch.equal(value, base[name]) for name, value in copied.items())
    with torch.no_grad():
        guide.encoder.conv_in.weight.add_(1)
    assert not torch.equal(guide.encoder.conv_in.weight, unet.conv_in.weight)


@pytest.mark.parametrize("change", ["inpainting", "LoRA"])
def test_the_full_guide_copies_an_inpainting_unet_and_one_with_a_lora(
    unet: UNet2DConditionModel, inputs: GuideInputs, change: str
) -> None:
    expected = unet.state_dict()["conv_in.weight"].clone()
    if change == "inpainting":
        unet = components.unet(in_channels=9)
        expected = unet.conv_in.weight[:, :4]
    else:
        config = LoraConfig(r=2, target_modules=["to_k", "conv_in"], init_lora_weights=False)
        unet.add_adapter(config)
    guide = FullGuide.for_denoiser(unet, "epsilon")
    assert torch.equal(guide.encoder.conv_in.weight, expected)
    assert not any(tensor.any() for tensor in added(guide, inputs).values())
    guide.check(Backbone.of(components.unet()).signature("epsilon"))


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (16, 12)])
def test_the_external_guide_fits_every_size_of_latents(
    unet: UNet2DConditionModel, inputs: GuideInputs, size: tuple[int, int]
) -> None:
    guide = ExternalGuide.for_denoiser(unet, "epsilon", rank=8, rounds=2)
    seen: list[torch.Tensor] = []
    hook = unet.mid_block.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        latents = torch.zeros(3, 4, *size)
        unet(latents, 10, inputs.text.embeds)
        skips, middle = guide(replace(inputs, latents=latents)).encoder
    hook.remove()
    assert middle.shape == seen[0].shape
    assert skips[0].shape[-2:] == latents.shape[-2:]


@pytest.mark.parametrize("share", [0.003, 0.005, 0.01])
def test_a_tiny_guide_has_at_most_its_share_of_the_denoiser(share: float) -> None:
    unet = components.unet(block_out_channels=(64, 128), norm_num_groups=8)
    allowed = share * sum(p.numel() for p in unet.parameters())
    guide = TinyGuide.for_denoiser(unet, "epsilon", share=share, layers=2)
    rank = guide.config.rank
    wider = TinyGuide.for_denoiser(unet, "epsilon", rank=rank + 1, layers=2)
    own, too_many = (sum(p.numel() for p in g.parameters()) for g in (guide, wider))
    assert own <= allowed < too_many
    assert guide.config.head == 3 * rank


def test_an_addition_has_at_most_half_the_channels_of_its_layer() -> None:
    guide = TinyGuide.for_denoiser(components.unet(), "epsilon", share=100.0, layers=4)
    assert [a.down.shape[0] for a in guide.additions] == [8, 8, 4, 4]
