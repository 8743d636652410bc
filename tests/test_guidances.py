"""The guidances that can be taught: their identities, and that they are diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import guiders
from diffusers.hooks import LayerSkipConfig

from pilotfish import GuideError
from pilotfish.backbones import Backbone, degraded
from pilotfish.guidance import classifier_free_guidance
from pilotfish.guidances import CFG, Guidance
from tests import components

TIME = torch.tensor([0.9, 0.4])
GUIDANCES = {
    "cfg": CFG,
    "rescaled": Guidance("rescaled", guidance_rescale=0.6),
    "apg": Guidance("apg", eta=0.3, norm_threshold=5.0),
    "cfg_zero_star": Guidance("cfg_zero_star"),
    "slg": Guidance("slg", degraded_scale=0.4),
    "pag": Guidance("pag", degraded_scale=0.7),
    "autoguidance": Guidance("autoguidance"),
}
every = pytest.mark.parametrize("guidance", GUIDANCES.values(), ids=GUIDANCES)


def predictions() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the negative prompt, the prompt and the degraded denoiser."""
    random = torch.Generator().manual_seed(1)
    n, c, d = torch.randn(3, 2, 4, 8, 8, generator=random)
    return n, c + n, d


def guided(guidance: Guidance, w: Any) -> torch.Tensor:
    n, c, d = predictions()
    second = guidance.second(n, c, d if guidance.degrades else None)
    return guidance.combine(second, c, w, classifier_free_guidance)


@pytest.mark.parametrize(
    "neutral",
    [
        Guidance("rescaled", guidance_rescale=0.0),
        Guidance("apg", eta=1.0),
        Guidance("slg", degraded_scale=0.0),
        Guidance("pag", degraded_scale=0.0),
    ],
    ids=lambda g: g.guidance,
)
def test_neutral_settings_are_cfg_bit_for_bit(neutral: Guidance) -> None:
    assert not neutral.degrades
    for w in (4.0, torch.tensor([2.0, 7.5])):
        assert torch.equal(guided(neutral, w), guided(CFG, w))
        assert not torch.equal(guided(CFG, w), guided(GUIDANCES[neutral.guidance], w))


@every
def test_each_is_the_conditional_prediction_at_scale_one(guidance: Guidance) -> None:
    _, c, _ = predictions()
    torch.testing.assert_close(guided(guidance, 1.0), c, atol=1e-5, rtol=1e-5)
    mixed = guided(guidance, torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(mixed[:1], c[:1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[1:], guided(guidance, 4.0)[1:])


def guider(guidance: Guidance, w: float) -> Any:
    """Diffusers' own, in the middle of a call."""
    name, third = guidance.guidance, guidance.degraded_scale * (w - 1)
    skip = LayerSkipConfig([0], "mid_block.attentions.0.transformer_blocks")
    perturb = LayerSkipConfig(
        [0], skip.fqn, skip_attention=False, skip_attention_scores=True, skip_ff=False
    )  # fmt: skip
    made: Any = {
        "cfg": lambda: guiders.ClassifierFreeGuidance(w),
        "rescaled": lambda: guiders.ClassifierFreeGuidance(w, guidance.guidance_rescale),
        "apg": lambda: guiders.AdaptiveProjectedGuidance(
            w - 1, adaptive_projected_guidance_rescale=guidance.norm_threshold, eta=guidance.eta,
            use_original_formulation=True,
        ),
        "cfg_zero_star": lambda: guiders.ClassifierFreeZeroStarGuidance(w, zero_init_steps=0),
        "slg": lambda: guiders.SkipLayerGuidance(
            w, third, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
            skip_layer_config=skip,
        ),
        "pag": lambda: guiders.PerturbedAttentionGuidance(
            w, third, perturbed_guidance_start=0.0, perturbed_guidance_stop=1.0,
            perturbed_guidance_config=perturb,
        ),
        "autoguidance": lambda: guiders.AutoGuidance(w, auto_guidance_config=skip),
    }[name]()  # fmt: skip
    made.set_state(step=3, num_inference_steps=10, timestep=torch.tensor(500))
    return made


@every
def test_each_is_that_of_diffusers(guidance: Guidance) -> None:
    n, c, d = predictions()
    given = {"pred_cond": c, "pred_uncond": d if guidance.replaces_second else n}
    if guidance.passes == 3:
        given["pred_cond_skip"] = d
    expected = guider(guidance, 4.0).forward(**given).pred
    torch.testing.assert_close(guided(guidance, 4.0), expected, atol=1e-5, rtol=1e-5)


@every
def test_what_is_saved_of_it_is_read_again(guidance: Guidance) -> None:
    plain = guidance.plain()
    assert (plain is None) == (guidance == CFG)
    assert Guidance.saved(plain) == guidance


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"guidance": "cgf"}, "guidance must be one of cfg, rescaled"),
        ({"guidance": "cfg", "eta": 0.5}, "eta is a setting of guidance apg, and cfg has none"),
        ({"guidance": "apg", "eta": 1.5}, "eta must be at most 1"),
        ({"guidance": "slg", "degraded_scale": -1.0}, "degraded_scale must be at least 0"),
        ({"guidance": "apg", "momentum": 0.5}, "no field momentum"),
        (
            {"guidance": "autoguidance", "weak_model": "x", "degraded_layers": ["blocks.0"]},
            "weak_model or degraded_layers",
        ),
    ],
)
def test_wrong_settings_are_refused(given: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Guidance.saved(given)


# -- the degraded denoiser -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["slg", "pag", "autoguidance"])
def test_a_degraded_denoiser_is_as_before_afterwards(name: str) -> None:
    family = components.FAMILIES["unet"]
    unet, text, latents = family.denoiser(), family.text(2), family.latents(2)
    components.randomise(unet)
    backbone, before = Backbone.of(unet), [set(vars(module)) for module in unet.modules()]
    with torch.no_grad():
        plain = backbone(latents, TIME, text)
        with degraded(unet, GUIDANCES[name]) as worse:
            assert worse is unet
            assert not torch.equal(backbone(latents, TIME, text), plain)
        assert torch.equal(backbone(latents, TIME, text), plain)
    assert [set(vars(module)) for module in unet.modules()] == before


def test_blocks_that_diffusers_cannot_degrade_are_refused_in_words() -> None:
    sd3 = components.FAMILIES["sd3"].denoiser()
    before = [set(vars(module)) for module in sd3.modules()]
    for settings, words in (
        ({}, "has no transformer block in a mid block; name the blocks"),
        ({"degraded_layers": ("transformer_blocks.9",)}, "has no block transformer_blocks.9"),
        ({"degraded_layers": ("norm_out",)}, "has no block norm_out"),
    ):
        with pytest.raises(GuideError, match=words), degraded(sd3, Guidance("slg", **settings)):
            pass
    known = Guidance("pag", degraded_layers=("transformer_blocks.1",))
    with pytest.raises(GuideError, match="cannot perturb the attention"), degraded(sd3, known):
        pass
    assert [set(vars(module)) for module in sd3.modules()] == before
