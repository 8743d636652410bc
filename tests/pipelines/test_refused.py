"""Pipelines that cannot take a guide, and arguments that have no second pass to act on."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor2_0

from pilotfish import GuideError
from tests.pipelines import hosts, refused
from tests.pipelines.matrix import pipelines


@pytest.mark.parametrize(("name", "why"), refused.ATTACHED)
def test_refused_when_attached(name: str, why: str) -> None:
    pipe = refused.build(name)
    before = set(vars(pipe))
    with pytest.raises(GuideError) as caught:
        hosts.guide("SD").attach(pipe)
    assert str(caught.value) == refused.sentence(name, why)
    assert (type(pipe).__name__, set(vars(pipe))) == (name, before)


@pytest.mark.parametrize(("name", "pipeline"), zip(("SD", "SDXL"), refused.PAG, strict=True))
def test_perturbed_attention_is_refused_in_a_call(name: str, pipeline: str) -> None:
    layers = {"pag_applied_layers": ["mid"]}
    host, guide = hosts.host(name, pipeline, **layers), hosts.guide(name)
    perturbed = host.draw(pag_scale=3.0)
    with guide.attached(host.pipe):
        with pytest.raises(GuideError) as caught:
            host.draw(pag_scale=3.0)
        assert str(caught.value) == refused.sentence(pipeline)
        with host.batches() as sizes:
            host.draw(pag_scale=0.0)
        assert sizes == [2, 2]
    assert torch.equal(host.draw(pag_scale=3.0), perturbed)


@pytest.mark.parametrize("name", pipelines("guidance_rescale"))
def test_rescaling_warns(name: str) -> None:
    host = hosts.host(name)
    with hosts.guide(name).attached(host.pipe):
        guided = host.draw()
        with pytest.warns(UserWarning, match="guidance_rescale acts on the second pass"):
            assert torch.equal(host.draw(guidance_rescale=0.7), guided)


@pytest.mark.parametrize("name", pipelines("guess_mode"))
def test_guess_mode_warns(name: str) -> None:
    host = hosts.host(name)
    conditional = host.draw(guidance_scale=1.0, guess_mode=True)
    with (
        hosts.guide(name, trained=False).attached(host.pipe),
        pytest.warns(UserWarning, match="guess_mode acts on the second pass"),
    ):
        assert torch.equal(host.draw(guess_mode=True), conditional)


def test_a_controlnet_that_guesses_by_itself_warns() -> None:
    host = hosts.host("SD ControlNet", **copy.deepcopy(hosts.shared("SD ControlNet")))
    host.pipe.controlnet.register_to_config(global_pool_conditions=True)
    with (
        hosts.guide("SD ControlNet").attached(host.pipe),
        pytest.warns(UserWarning, match="guess_mode acts on the second pass"),
    ):
        host.draw()


@pytest.mark.parametrize("name", pipelines("negative_original_size"))
def test_sizes_of_the_second_pass_warn(name: str) -> None:
    host = hosts.host(name)
    sizes = {"negative_original_size": (8, 8), "negative_target_size": (8, 8)}
    with hosts.guide(name).attached(host.pipe):
        guided = host.draw()
        with pytest.warns(UserWarning, match="negative_original_size acts on the second pass"):
            assert torch.equal(host.draw(**sizes), guided)


def test_custom_diffusion_is_refused_and_nothing_is_left() -> None:
    host = hosts.host("SD")
    unet = host.pipe.unet

    def hooked() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())

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
    with pytest.raises(GuideError, match="keys and values of Custom Diffusion's own"):
        hosts.guide("SD").attach(host.pipe)
    assert hooked() == 0
