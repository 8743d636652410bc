"""A guide that was taught another guidance than CFG: what a refresh and a comparison run."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import HookRegistry, apply_layer_skip
from packaging.version import Version

from pilotfish import GuideError
from pilotfish.guidances import Guidance
from pilotfish.pipelines import Reference
from tests.pipelines.pipelines import Pipeline, build, guide, plain
from tests.test_guidances import GUIDANCES, guider

W = 4.0
OTHERS = {k: v for k, v in GUIDANCES.items() if k != "cfg"}


def by_hand(one: Pipeline, guidance: Guidance) -> torch.Tensor:
    """Latents sampled with diffusers' own guider and scheduler, every pass in a call of its own."""
    kept: dict[str, Any] = {}
    pipe, rule = one.pipe, guider(guidance, W)
    configs = getattr(rule, "skip_layer_config", None) or getattr(rule, "auto_guidance_config", [])

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        kept.setdefault("latents", args[0].chunk(2)[1])
        kept["text"] = kwargs["encoder_hidden_states"]

    handle = one.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    one.latents(guidance_scale=W)
    handle.remove()
    latents, (negative, prompt) = kept["latents"], kept["text"].chunk(2)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(len(pipe.scheduler.timesteps))

    def call(z: torch.Tensor, t: Any, text: torch.Tensor, worse: bool = False) -> torch.Tensor:
        for config in configs if worse else ():
            apply_layer_skip(one.denoiser, config)
        made: torch.Tensor = one.denoiser(z, t, text, return_dict=False)[0]
        HookRegistry.check_if_exists_or_initialize(one.denoiser).remove_hook("layer_skip_hook")
        return made

    with torch.no_grad():
        for t in scheduler.timesteps:
            found = {
                "pred_cond": call(latents, t, prompt),
                "pred_uncond": call(latents, t, negative, worse=guidance.replaces_second),
            }
            if guidance.passes == 3:
                found["pred_cond_skip"] = call(latents, t, prompt, worse=True)
            latents = scheduler.step(rule.forward(**found).pred, t, latents)[0]
    return latents


@pytest.mark.parametrize("name", OTHERS)
def test_refreshed_at_every_step_the_images_are_those_of_what_it_was_taught(name: str) -> None:
    guidance = OTHERS[name]
    expected = by_hand(build("SD"), guidance)
    one = build("SD")
    taught = guide("SD", teacher=guidance.plain())
    with taught.attached(one.pipe, refresh=1.0):
        refreshed = one.latents(guidance_scale=W)
    torch.testing.assert_close(refreshed, expected, rtol=1e-4, atol=1e-4)
    with Reference(guidance).attached(one.pipe):
        torch.testing.assert_close(one.latents(guidance_scale=W), refreshed)
    assert not torch.allclose(refreshed, plain("SD"), rtol=1e-3, atol=1e-3)
    assert torch.equal(one.latents(), plain("SD")), "nothing stays"


@pytest.mark.parametrize("name", ["SD3", "PixArt-Sigma", "Z-Image", "Qwen-Image", "FLUX.2 klein"])
def test_every_family_runs_all_passes(name: str) -> None:
    if name == "FLUX.2 klein" and Version(diffusers.__version__) < Version("0.42"):
        pytest.skip("diffusers can skip its blocks from 0.42 on")
    stack = {"SD3": "transformer_blocks.1", "Z-Image": "layers.0"}.get(name, "transformer_blocks.0")
    guidance = Guidance("slg", degraded_scale=0.5, degraded_layers=(stack,))
    one = build(name)
    with Reference(Guidance("apg", eta=1.0)).attached(one.pipe):
        neutral = one.latents()
    assert neutral.shape == plain(name).shape
    with Reference(guidance).attached(one.pipe), one.batches() as sizes:
        made = one.latents()
    assert sizes == [2, 4] * (len(sizes) // 2), "the degraded pass, then both"
    weaker = Guidance("autoguidance", degraded_layers=(stack,))
    with Reference(weaker).attached(one.pipe), one.batches() as sizes:
        assert not torch.equal(one.latents(), made)
    assert set(sizes) == {2}
    assert not torch.equal(made, neutral)
    with Reference(Guidance("cfg")).attached(one.pipe):
        assert torch.equal(one.latents(), plain(name))


def test_without_a_refresh_it_is_one_pass() -> None:
    one = build("SD")
    with guide("SD", teacher=OTHERS["slg"].plain()).attached(one.pipe), one.batches() as sizes:
        one.latents()
    assert set(sizes) == {2}


def test_a_refresh_with_a_weaker_model_is_refused() -> None:
    one, taught = build("SD"), Guidance("autoguidance", weak_model="weak/base")
    made = guide("SD", teacher=taught.plain())
    with pytest.raises(GuideError, match=r"weaker model weak/base.*refresh=0"):
        made.attach(one.pipe, refresh=2)
    with made.attached(one.pipe, refresh=0):
        one.latents()


def test_a_controlnet_and_a_third_pass_are_refused() -> None:
    one = build("SD ControlNet")
    with (
        guide("SD ControlNet", teacher=OTHERS["pag"].plain()).attached(one.pipe, refresh=1),
        pytest.raises(GuideError, match="perturbed-attention guidance is not implemented with a C"),
    ):
        one.latents()


def test_the_weaker_model_of_autoguidance_is_loaded(tmp_path: Any) -> None:
    one, other = build("SD"), build("SD")
    other.denoiser.save_pretrained(tmp_path)
    itself = Guidance("autoguidance", weak_model=str(tmp_path))
    with Reference(itself).attached(one.pipe):
        torch.testing.assert_close(one.latents(), plain("SD"), rtol=1e-4, atol=1e-4)
