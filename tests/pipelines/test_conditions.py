"""What else a denoiser is conditioned on: IP-Adapter, LoRA, learned tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from tests.pipelines import hosts
from tests.pipelines.hosts import KINDS, SIDE, Host
from tests.pipelines.matrix import pipelines

WIDTH = 16


def load_ip_adapter(host: Host) -> None:
    """A random IP-Adapter of one picture, and the image encoder that goes with it."""
    unet = host.pipe.unet
    torch.manual_seed(10)
    width = unet.config.cross_attention_dim
    layers = [p for name, p in unet.named_parameters() if name.endswith("attn2.to_k.weight")]
    names = [name for name in unet.attn_processors if "attn2" in name]
    hidden = {n: unet.get_submodule(n.removesuffix(".processor")).inner_dim for n in names}
    keys = {2 * i + 1: hidden[n] for i, n in enumerate(names)}
    assert len(layers) == len(keys)
    adapter = {
        f"{key}.to_{part}_ip.weight": torch.randn(size, width)
        for key, size in keys.items()
        for part in ("k", "v")
    }
    projection = {
        "proj.weight": torch.randn(4 * width, WIDTH),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": adapter}])
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        image_size=SIDE, patch_size=8, projection_dim=WIDTH,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    processor = CLIPImageProcessorPil(size=size, crop_size=size)
    encoder = CLIPVisionModelWithProjection(config).eval()
    host.pipe.register_modules(image_encoder=encoder, feature_extractor=processor)


def shows(host: Host, name: str, call: dict[str, Any], plain: dict[str, Any]) -> None:
    """A fresh guide is the conditional model that sees the picture, and leaves CFG as it was."""
    conditional, cfg = host.draw(guidance_scale=1.0, **plain), host.draw(**call)
    with hosts.guide(name, trained=False).attached(host.pipe), host.batches() as sizes:
        assert torch.equal(host.draw(**call), conditional)
    assert set(sizes) == {2}
    with hosts.guide(name).attached(host.pipe):
        assert not torch.allclose(host.draw(**call), conditional)
    assert torch.equal(host.draw(**call), cfg)


@pytest.mark.parametrize("name", pipelines("IP-Adapter, image"))
def test_a_picture_as_a_prompt(name: str) -> None:
    host = hosts.host(name)
    load_ip_adapter(host)
    picture = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(11))
    pictures = host.pipe.image_processor.postprocess(2 * picture - 1)
    asked = {"ip_adapter_image": [pictures]}
    shows(host, name, asked, asked)


@pytest.mark.parametrize("name", pipelines("IP-Adapter, embeds"))
def test_a_picture_given_by_its_doubled_embeddings(name: str) -> None:
    host = hosts.host(name)
    load_ip_adapter(host)
    embeds = torch.randn(4, 1, WIDTH, generator=torch.Generator().manual_seed(11))
    shows(
        host, name, {"ip_adapter_image_embeds": [embeds]}, {"ip_adapter_image_embeds": [embeds[2:]]}
    )


def lora(name: str) -> dict[str, torch.Tensor]:
    """A LoRA on what a guide has hooks on, and more."""
    unet = hosts.host(name).pipe.unet
    layers = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "time_emb_proj", "conv_out"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=layers))
    torch.manual_seed(12)
    state = get_peft_model_state_dict(unet)
    return {f"unet.{k}": 0.3 * torch.randn(v.shape) for k, v in state.items()}


@pytest.mark.parametrize("name", pipelines("LoRA"))
def test_a_lora_loaded_before_or_after(name: str) -> None:
    host, guide = hosts.host(name), hosts.guide(name)
    with guide.attached(host.pipe):
        alone = host.draw()
        host.pipe.load_lora_weights(lora(name))
        after = host.draw()
    assert not torch.allclose(after, alone)
    with guide.attached(host.pipe):
        assert torch.equal(host.draw(), after)
    conditional = host.draw(guidance_scale=1.0)
    with hosts.guide(name, trained=False).attached(host.pipe):
        assert torch.equal(host.draw(), conditional)


@pytest.mark.parametrize("name", pipelines("LoRA scale"))
def test_the_scale_of_a_lora_reaches_the_denoiser(name: str) -> None:
    host, half = hosts.host(name), {"cross_attention_kwargs": {"scale": 0.5}}
    host.pipe.load_lora_weights(lora(name))
    conditional = host.draw(guidance_scale=1.0, **half)
    with hosts.guide(name, trained=False).attached(host.pipe):
        assert torch.equal(host.draw(**half), conditional)
    with hosts.guide(name).attached(host.pipe):
        none = host.draw(cross_attention_kwargs={"scale": 0.0})
        assert not torch.allclose(host.draw(**half), none)
        host.pipe.disable_lora()
        torch.testing.assert_close(host.draw(), none)


@pytest.mark.parametrize("name", pipelines("LoRA unloaded"))
def test_an_unloaded_lora_leaves_no_trace(name: str) -> None:
    host = hosts.host(name)
    with hosts.guide(name).attached(host.pipe):
        alone = host.draw()
        host.pipe.load_lora_weights(lora(name))
        host.draw()
        host.pipe.unload_lora_weights()
        torch.testing.assert_close(host.draw(), alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", pipelines("textual inversion"))
def test_a_learned_token(name: str) -> None:
    texts = {k: v for k, v in hosts.shared(name).items() if k.startswith(("tok", "text"))}
    host = hosts.host(name, **{k: copy.deepcopy(v) for k, v in texts.items()})
    for which in ("", "_2") if KINDS[name].xl else ("",):
        host.pipe.load_textual_inversion(
            {"<thing>": torch.randn(WIDTH)}, tokenizer=getattr(host.pipe, f"tokenizer{which}"),
            text_encoder=getattr(host.pipe, f"text_encoder{which}"),
        )  # fmt: skip
    asked = {"prompt": ["<thing>", "a <thing>"], "negative_prompt": ["<thing>", "red"]}
    conditional = host.draw(guidance_scale=1.0, **asked)
    with hosts.guide(name, trained=False).attached(host.pipe):
        assert torch.equal(host.draw(**asked), conditional)
    with hosts.guide(name).attached(host.pipe):
        guided = host.draw(**asked)
        assert not torch.allclose(guided, host.draw(**(asked | {"negative_prompt": ["red"] * 2})))
