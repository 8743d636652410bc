"""What else a denoiser is conditioned on: IP-Adapter, LoRA, learned tokens."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import (
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.guidances import CFG
from pilotfish.interface import GuideOutput, TextConditions
from tests.pipelines import pipelines
from tests.pipelines.matrix import covered
from tests.pipelines.pipelines import Pipeline, build, guide, guided, plain
from tests.pipelines.specs import PIPELINES, SIDE

WIDTH = 16


def load_ip_adapter(one: Pipeline) -> None:
    """A random IP-Adapter of one image, and the image encoder that goes with it."""
    unet = one.pipe.unet
    torch.manual_seed(10)
    width = unet.config.cross_attention_dim
    names = [name for name in unet.attn_processors if "attn2" in name]
    hidden = {n: unet.get_submodule(n.removesuffix(".processor")).inner_dim for n in names}
    keys = {2 * i + 1: hidden[n] for i, n in enumerate(names)}
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
    processor = CLIPImageProcessor(size=size, crop_size=size)
    encoder = CLIPVisionModelWithProjection(config).eval()
    one.pipe.register_modules(image_encoder=encoder, feature_extractor=processor)


def shows(one: Pipeline, name: str, call: dict[str, Any], conditional: dict[str, Any]) -> None:
    """A fresh guide is the conditional model that sees the image, and leaves CFG as it was."""
    expected, cfg = one.latents(guidance_scale=1.0, **conditional), one.latents(**call)
    with guide(name, trained=False).attached(one.pipe), one.batches() as sizes:
        assert torch.equal(one.latents(**call), expected)
    assert set(sizes) == {2}
    with guide(name).attached(one.pipe):
        assert not torch.allclose(one.latents(**call), expected)
    assert torch.equal(one.latents(**call), cfg)


@pytest.mark.parametrize("name", covered("IP-Adapter, image"))
def test_an_image_as_a_prompt(name: str) -> None:
    one = build(name)
    load_ip_adapter(one)
    image = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(11))
    call = {"ip_adapter_image": [one.pipe.image_processor.postprocess(2 * image - 1)]}
    shows(one, name, call, call)


@pytest.mark.parametrize("name", covered("IP-Adapter, embeds"))
def test_an_image_given_by_its_doubled_embeddings(name: str) -> None:
    one = build(name)
    load_ip_adapter(one)
    embeds = torch.randn(4, 1, WIDTH, generator=torch.Generator().manual_seed(11))
    doubled, image = (
        {"ip_adapter_image_embeds": [embeds]},
        {"ip_adapter_image_embeds": [embeds[2:]]},
    )
    shows(one, name, doubled, image)


class Extrapolating:
    """A guide that extrapolates one attention layer with the same gain for all heads."""

    target_modules = ()
    joint_attention, image_tokens, negative_stream = "whole", 0, "joint"
    dtype = torch.float32
    guidance_scale_range = (1.0, 8.0)
    guidance = CFG

    def __init__(self, layer: str, heads: int, gain: float) -> None:
        self.extrapolated = (layer,)
        self.output = GuideOutput(gains={layer: torch.full((1, heads), gain)})

    def modulations(self, *given: Any) -> None:
        return None

    def __call__(self, inputs: Any, modulations: Any = None) -> GuideOutput:
        return self.output


def test_the_image_of_an_ip_adapter_is_extrapolated_with_the_text() -> None:
    """``a`` has the image's part and ``a_n``, the negative prompt's, has none: with the gain -1
    only the negative prompt is left, without the image."""
    one = build("SD")
    text, negative = torch.randn(2, 8, WIDTH), torch.randn(2, 8, WIDTH)
    backbone = Backbone.of(one.denoiser)
    layer, heads = backbone.signature("epsilon")["attention"][0]
    attention = one.denoiser.get_submodule(layer)
    entered: list[torch.Tensor] = []
    given = torch.randn(2, 4, attention.query_dim)

    def attend(states: Any, gain: float | None = None, image: Any = None) -> torch.Tensor:
        """The layer's output, with or without a guide."""
        used = Extrapolating(layer, heads, gain or 0.0)
        hooks = backbone.install(used)  # type: ignore[arg-type]
        guided = GuidedPass(used, lambda: 2.0, lambda: TextConditions(negative))  # type: ignore[arg-type]
        guided.active, guided.output = gain is not None, used.output
        guided.negative = TextConditions(negative)
        note = attention.to_out[0].register_forward_hook(lambda m, a, o: entered.append(a[0]))
        with torch.no_grad(), guided.open():
            attention(given, states if image is None else (states, image))
        note.remove()
        hooks.remove()
        return entered.pop()

    plain_negative = attend(negative)
    load_ip_adapter(one)
    image = [torch.randn(2, 1, 4, WIDTH)]
    both = attend(text, image=image)
    torch.testing.assert_close(attend(text, -1.0, image), plain_negative)
    expected = both + 0.5 * (both - plain_negative)
    torch.testing.assert_close(attend(text, 0.5, image), expected)


def _lora_config(name: str) -> LoraConfig:
    """Of a LoRA on what a guide has hooks on, and more."""
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    layers += {
        "SD3": ["context_embedder", "norm1.linear", "add_k_proj", "proj_out"],
        "PixArt": ["caption_projection.linear_1", "proj_out"],
        "Sana": ["caption_projection.linear_1", "proj_out"],
        "Qwen": ["txt_in", "add_k_proj", "proj_out"],
        "AuraFlow": ["context_embedder", "add_k_proj", "proj_out"],
        "Flux2Klein": ["context_embedder", "add_k_proj", "to_qkv_mlp_proj", "proj_out"],
        "ZImage": ["cap_embedder.1", "linear"],
        "Wan": ["text_embedder.linear_1", "proj_out"],
        "Lumina2": ["caption_embedder.1", "norm_out.linear_2"],
    }.get(PIPELINES[name].family, ["conv1", "time_emb_proj", "conv_out"])
    return LoraConfig(r=2, lora_alpha=2, target_modules=layers)


@cache
def lora(name: str) -> dict[str, torch.Tensor]:
    """The weights of a LoRA."""
    one = build(name)
    inject_adapter_in_model(_lora_config(name), one.denoiser)
    torch.manual_seed(12)
    state = get_peft_model_state_dict(one.denoiser)
    return {f"{one.component}.{k}": 0.3 * torch.randn(v.shape) for k, v in state.items()}


def load_lora(one: Pipeline, name: str) -> None:
    """By the pipeline, or where it cannot by the denoiser."""
    if hasattr(one.pipe, "load_lora_weights"):
        one.pipe.load_lora_weights(dict(lora(name)))
    else:  # PixArt has no loader
        inject_adapter_in_model(_lora_config(name), one.denoiser)
        state = {k.removeprefix(f"{one.component}."): v for k, v in lora(name).items()}
        set_peft_model_state_dict(one.denoiser, state)


def unload_lora(one: Pipeline) -> None:
    if hasattr(one.pipe, "unload_lora_weights"):
        one.pipe.unload_lora_weights()
    else:
        recurse_remove_peft_layers(one.denoiser)


@pytest.mark.parametrize("name", covered("LoRA"))
def test_a_lora_loaded_before_or_after(name: str) -> None:
    one, used = build(name), guide(name)
    with used.attached(one.pipe):
        one.latents()
        load_lora(one, name)
        after = one.latents()
    assert not torch.allclose(after, guided(name))
    conditional = one.latents(guidance_scale=1.0)
    with used.attached(one.pipe):
        assert torch.equal(one.latents(), after)
        unload_lora(one)
        torch.testing.assert_close(one.latents(), guided(name), atol=1e-3, rtol=1e-3)
        load_lora(one, name)
    with guide(name, trained=False).attached(one.pipe):
        assert torch.equal(one.latents(), conditional)


@pytest.mark.parametrize("name", covered("LoRA scale"))
def test_the_scale_of_a_lora_reaches_the_denoiser(name: str) -> None:
    one = build(name)
    which = "joint" if PIPELINES[name].family == "SD3" else "cross"
    half, none = ({f"{which}_attention_kwargs": {"scale": s}} for s in (0.5, 0.0))
    load_lora(one, name)
    conditional = one.latents(guidance_scale=1.0, **half)
    with guide(name, trained=False).attached(one.pipe):
        assert torch.equal(one.latents(**half), conditional)
    with guide(name).attached(one.pipe):
        without = one.latents(**none)
        assert not torch.allclose(one.latents(**half), without)
        one.pipe.disable_lora()
        torch.testing.assert_close(one.latents(), without)


@pytest.mark.parametrize("name", covered("textual inversion"))
def test_a_learned_token(name: str) -> None:
    texts = {k: v for k, v in pipelines.shared(name).items() if k.startswith(("tok", "text"))}
    one = build(name, **{k: copy.deepcopy(v) for k, v in texts.items()})
    for which in ("", "_2") if PIPELINES[name].family == "SDXL" else ("",):
        one.pipe.load_textual_inversion(
            {"<thing>": torch.randn(WIDTH)}, tokenizer=getattr(one.pipe, f"tokenizer{which}"),
            text_encoder=getattr(one.pipe, f"text_encoder{which}"),
        )  # fmt: skip
    call = {"prompt": ["<thing>", "a <thing>"], "negative_prompt": ["<thing>", "red"]}
    conditional = one.latents(guidance_scale=1.0, **call)
    assert not torch.equal(conditional, plain(name, 1.0))
    with guide(name, trained=False).attached(one.pipe):
        assert torch.equal(one.latents(**call), conditional)
    with guide(name).attached(one.pipe):
        with_token = one.latents(**call)
        assert not torch.allclose(
            with_token, one.latents(**(call | {"negative_prompt": ["red"] * 2}))
        )
