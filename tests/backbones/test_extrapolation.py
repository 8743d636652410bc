"""Layers that take in the text, extrapolated away from the negative prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model

from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.backbones.cache import TABLE_BYTES
from pilotfish.backbones.extrapolation import JointBlock, split_heads
from pilotfish.interface import GuideError, GuideOutput, TextConditions
from pilotfish.teacher import checkpoint_in_pass
from tests import components
from tests.backbones.stubs import TIME, FixedGuide, count_hooks, equal_gains, guided, plain

SIZES = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
POOLED = 12
POOLED_TEXT = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + POOLED,
}  # fmt: skip
"""As SDXL has it."""
UNET_SHAPES: list[dict[str, Any]] = [
    {},
    {"layers_per_block": 2, "transformer_layers_per_block": 2},
    {"layers_per_block": (1, 2), "attention_head_dim": (2, 4), "use_linear_projection": True},
    {"reverse_transformer_layers_per_block": (3, 2)},
    {"mid_block_type": None},
]
UNET_TEXT: list[dict[str, Any]] = [
    {},
    {"addition_embed_type": None},
    {"resnet_time_scale_shift": "scale_shift"},
    {"resnet_skip_time_act": True},
    POOLED_TEXT,
]
SD3_SHAPES: list[dict[str, Any]] = [
    {},
    {"qk_norm": None},
    {"dual_attention_layers": ()},
    {"dual_attention_layers": (0, 1), "num_layers": 4, "patch_size": 1},
    {"num_layers": 1, "dual_attention_layers": ()},
]
TWO_THEN_ONE_SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("aura-flow", {}),
    ("aura-flow", {"num_mmdit_layers": 3, "num_single_dit_layers": 0, "patch_size": 1}),
    ("aura-flow", {"num_mmdit_layers": 0, "num_single_dit_layers": 1}),
    ("flux2", {}),
    ("flux2", {"num_layers": 3, "num_single_layers": 0}),
    ("flux2", {"num_layers": 0, "num_single_layers": 1, "mlp_ratio": 4.0}),
]
"""Blocks of two streams, then blocks of one."""
MASKED_SHAPES: list[tuple[str, dict[str, Any]]] = [
    ("pixart", {}),
    ("pixart", {"num_layers": 3, "patch_size": 1}),
    ("ltx", {}),
    ("chroma", {}),
    ("chroma", {"num_layers": 1, "num_single_layers": 3}),
    ("cogview4", {}),
    ("cogview4", {"num_layers": 2, "patch_size": 1}),
    ("lumina2", {}),
    ("lumina2", {"num_layers": 2, "patch_size": 1, "num_kv_heads": 3, "num_refiner_layers": 2}),
    ("qwen", {}),
    ("qwen", {"num_layers": 1}),
    ("z-image", {}),
    ("z-image", {"n_layers": 2, "n_refiner_layers": 2, "qk_norm": False}),
    ("sana", {}),
    ("sana", {"num_layers": 3, "patch_size": 1, "qk_norm": None}),
]


def assert_negative_is_recovered(
    denoiser: Any, text: TextConditions, negative: TextConditions, sizes: Any = None
) -> None:
    """A gain of -1 in every layer gives the prediction for the negative prompt."""
    video = isinstance(denoiser, WanTransformer3DModel | LTXVideoTransformer3DModel)
    kind = "wan" if video else "unet"
    latents = components.FAMILIES[kind].latents(2)
    unconditional = plain(denoiser, latents, negative[torch.tensor([0, 0])], sizes=sizes)
    conditional = plain(denoiser, latents, text, sizes=sizes)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)))
    made = guided(denoiser, guide, latents, text, negative, sizes=sizes)
    torch.testing.assert_close(made, unconditional, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(made, conditional, atol=1e-4)


def unet_text(denoiser: Any, n: int, length: int = 8, seed: int = 6) -> TextConditions:
    made = components.FAMILIES["unet"].text(n, length, seed)
    if denoiser.config.addition_embed_type != "text_time":
        return made
    generator = torch.Generator().manual_seed(seed + 1)
    return TextConditions(made.embeds, torch.randn(n, POOLED, generator=generator))


@pytest.mark.parametrize("config", UNET_SHAPES)
@pytest.mark.parametrize("text", UNET_TEXT)
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_a_unet(
    config: dict[str, Any], text: dict[str, Any]
) -> None:
    # the encoder's attention layers are not extrapolated
    down = {"down_block_types": ("DownBlock2D",) * 2}
    unet = components.randomise(components.unet(**down, **config, **text))
    if not any(equal_gains(unet, -1.0)):
        return
    assert_negative_is_recovered(
        unet, unet_text(unet, 2), unet_text(unet, 1, length=5, seed=3), SIZES
    )


@pytest.mark.parametrize("length", [8, 5, 11])
@pytest.mark.parametrize("config", SD3_SHAPES)
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_sd3(
    config: dict[str, Any], length: int
) -> None:
    """In joint attention the negative text's stream runs beside the pass."""
    family = components.FAMILIES["sd3"]
    assert_negative_is_recovered(
        family.denoiser(**config), family.text(2), family.text(1, length, seed=3)
    )


@torch.no_grad()
@pytest.mark.parametrize("config", SD3_SHAPES)
def test_joint_attention_may_be_extrapolated_by_the_text_alone(config: dict[str, Any]) -> None:
    """Two equal texts change nothing; a layer adds g times the difference of the two answers."""
    family = components.FAMILIES["sd3"]
    denoiser, text = family.denoiser(**config), family.text(2)
    gains = {k: v for k, v in equal_gains(denoiser, 2.0).items() if k.endswith(".attn")}
    alone = FixedGuide(GuideOutput(gains=gains), "text")
    same, latents = family.text(1, seed=6), family.latents(2)
    both = same[torch.tensor([0, 0])]
    torch.testing.assert_close(
        guided(denoiser, alone, latents, both, same), plain(denoiser, latents, both)
    )
    # by hand for one layer, whose text is that of the prompt alone
    first = {"transformer_blocks.0.attn": gains["transformer_blocks.0.attn"]}
    negative, seen = family.text(1, 5, seed=3), {}
    layer = denoiser.transformer_blocks[0].attn

    def note(name: str) -> Any:
        return lambda module, args, output: seen.setdefault(name, output)

    parts = {
        "q": layer.norm_q or layer.to_q, "k": layer.norm_added_k or layer.add_k_proj,
        "v": layer.add_v_proj,
    }  # fmt: skip
    handles = [module.register_forward_hook(note(name)) for name, module in parts.items()]
    out = layer.to_out[0].register_forward_pre_hook(lambda m, args: seen.setdefault("a", args[0]))
    plain(denoiser, latents, text)
    one, seen = dict(seen), {}
    plain(denoiser, latents, negative[torch.tensor([0, 0])])
    other, seen = dict(seen), {}
    guided(denoiser, FixedGuide(GuideOutput(gains=first), "text"), latents, text, negative)
    for handle in (*handles, out):
        handle.remove()

    def answer(found: dict[str, torch.Tensor]) -> torch.Tensor:
        q, k, v = (
            x if x.ndim == 4 else split_heads(x, layer.heads)
            for x in (one["q"], found["k"], found["v"])
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    expected = one["a"] + 2.0 * (answer(one) - answer(other))
    torch.testing.assert_close(seen["a"], expected, atol=1e-5, rtol=1e-4)


class TextReadsItself(JointAttnProcessor2_0):
    """Attention in which the image's tokens attend to all, the text's to each other alone."""

    def __call__(  # type: ignore[override]
        self, attn: Any, hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None, **kwargs: Any,
    ) -> Any:  # fmt: skip
        made = super().__call__(attn, hidden_states, encoder_hidden_states, **kwargs)
        if encoder_hidden_states is None:
            return made
        q, k, v = (
            split_heads(projection(encoder_hidden_states), attn.heads)
            for projection in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        if attn.norm_added_q is not None:
            q, k = attn.norm_added_q(q), attn.norm_added_k(k)
        own = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return made[0], made[1] if attn.context_pre_only else attn.to_add_out(own)


@torch.no_grad()
@pytest.mark.parametrize("largest", [TABLE_BYTES, 0])
@pytest.mark.parametrize("negatives", [1, 2])
@pytest.mark.parametrize("config", SD3_SHAPES)
def test_a_gain_of_minus_1_holds_with_a_cached_stream_where_text_reads_itself(
    config: dict[str, Any], negatives: int, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a single call, and where the stream is made for a whole schedule at its first step, or
    would be too large and is made for each step."""
    monkeypatch.setattr("pilotfish.backbones.cache.TABLE_BYTES", largest)
    family = components.FAMILIES["sd3"]
    denoiser, text = family.denoiser(**config), family.text(2)
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(TextReadsItself())
    negative, latents = family.text(negatives, 5, seed=3), family.latents(2)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)), negative_stream="cached")
    both = negative.expand(2)
    expected = plain(denoiser, latents, both)
    made = guided(denoiser, guide, latents, text, negative)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
    timesteps = torch.tensor([900.0, 500, 100])

    def call(t: torch.Tensor, given: TextConditions) -> torch.Tensor:
        found: torch.Tensor = denoiser(
            latents, given.embeds, given.pooled, t.expand(2), return_dict=False
        )[0]
        return found

    expected = torch.stack([call(t, both) for t in timesteps])
    hooks = Backbone.of(denoiser).install(guide)
    guided_pass = GuidedPass(guide, lambda: 4.0, lambda: negative, timesteps=lambda: timesteps)
    with guided_pass.open():
        made = torch.stack([call(t, text) for t in timesteps])
    hooks.remove()
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cached", [True, False])
def test_a_cached_stream_is_made_once_for_all_steps(
    monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    read, rows = JointBlock.read, list[int]()

    def counted(block: JointBlock, stream: torch.Tensor, embedding: torch.Tensor) -> Any:
        rows.append(len(stream))
        return read(block, stream, embedding)

    monkeypatch.setattr(JointBlock, "read", counted)
    family = components.FAMILIES["sd3"]
    denoiser, text, negative = family.denoiser(), family.text(2), family.text(1, 5, seed=3)
    gains = equal_gains(denoiser, 1.0)
    guide = FixedGuide(GuideOutput(gains=gains), negative_stream="cached" if cached else "joint")
    timesteps = torch.tensor([900.0, 500, 100])
    Backbone.of(denoiser).install(guide)
    with GuidedPass(guide, lambda: 4.0, lambda: negative, timesteps=lambda: timesteps).open():
        for t in timesteps:
            denoiser(family.latents(2), text.embeds, text.pooled, t.expand(2))
    blocks = len(denoiser.transformer_blocks)
    assert rows == ([len(timesteps)] * blocks if cached else [2] * len(timesteps) * blocks)


@pytest.mark.parametrize("form", [{"joint_attention": "text"}, {"negative_stream": "cached"}])
def test_a_form_is_refused_where_it_is_not_implemented(form: dict[str, str]) -> None:
    guide = FixedGuide(**form)
    denoiser = components.FAMILIES["qwen"].denoiser()
    with pytest.raises(GuideError, match="not implemented for QwenImageTransformer2DModel"):
        Backbone.of(denoiser).install(guide)
    assert count_hooks(denoiser) == 0


@pytest.mark.parametrize("length", [8, 5, 11])
@pytest.mark.parametrize(("name", "config"), TWO_THEN_ONE_SHAPES)
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_two_streams_that_join(
    name: str, config: dict[str, Any], length: int
) -> None:
    family = components.FAMILIES[name]
    assert_negative_is_recovered(
        family.denoiser(**config), family.text(2), family.text(1, length, seed=3)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((name, {}) for name in components.FAMILIES if name != "unet"),
        *(("unet", config) for config in UNET_TEXT),
    ],
)
def test_a_gain_of_minus_1_holds_at_each_step_of_a_schedule(
    name: str, config: dict[str, Any]
) -> None:
    """Where what depends on time and negative prompt is computed for all steps at once; and of
    two denoisers in one pass each has its own."""
    family, down = components.FAMILIES[name], {"down_block_types": ("DownBlock2D",) * 2}
    config = config | (down if name == "unet" else {})
    denoisers = [components.randomise(family.denoiser(seed=seed, **config)) for seed in (0, 1)]
    text, negative = (
        unet_text(denoisers[0], n, length, seed) if name == "unet" else family.text(n, length, seed)
        for n, length, seed in ((2, 8, 6), (1, 5, 3))
    )
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoisers[0], -1.0)))
    timesteps = torch.tensor([900, 500, 100])
    guided_pass = GuidedPass(guide, lambda: 4.0, lambda: negative, timesteps=lambda: timesteps)

    def call(backbone: Backbone, t: torch.Tensor, given: TextConditions) -> torch.Tensor:
        backbone.timestep = lambda time: t.expand(2)  # type: ignore[method-assign]
        return backbone(family.latents(2), TIME, given, SIZES)

    for denoiser in denoisers:
        Backbone.of(denoiser).install(guide)
    with guided_pass.open():
        made = [call(Backbone.of(net), t, text) for t in timesteps for net in denoisers]
    both = negative[torch.tensor([0, 0])]
    expected = [call(Backbone.of(net), t, both) for t in timesteps for net in denoisers]
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_controlnet_of_sd3_adds_to_both() -> None:
    """And a block that is skipped, which no gain reaches, is reported."""
    family = components.FAMILIES["sd3"]
    denoiser, negative = family.denoiser(), family.text(1, 5, seed=3)
    residuals = [torch.randn(2, 16, 16) for _ in range(3)]

    def call(text: TextConditions, **more: Any) -> torch.Tensor:
        made: torch.Tensor = denoiser(
            family.latents(2), text.embeds, text.pooled, 1000 * TIME, residuals,
            return_dict=False, **more,
        )[0]  # fmt: skip
        return made

    expected = call(negative[torch.tensor([0, 0])])
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)))
    Backbone.of(denoiser).install(guide)
    with GuidedPass(guide, lambda: 4.0, lambda: negative).open():
        torch.testing.assert_close(call(family.text(2)), expected, atol=1e-5, rtol=1e-4)
        with pytest.raises(GuideError, match=r"went past transformer_blocks\.1\.attn"):
            call(family.text(2), skip_layers=[1])


@pytest.mark.parametrize("length", [8, 5, 11])
@pytest.mark.parametrize("config", [{}, {"num_layers": 3, "cross_attn_norm": False}])
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_a_video(
    config: dict[str, Any], length: int
) -> None:
    family = components.FAMILIES["wan"]
    assert_negative_is_recovered(
        family.denoiser(**config), family.text(2), family.text(1, length, seed=3)
    )


@pytest.mark.parametrize("masks", ["both", "prompt", "negative", "none"])
@pytest.mark.parametrize("length", [8, 5, 11])
@pytest.mark.parametrize(("name", "config"), MASKED_SHAPES)
def test_a_gain_of_minus_1_gives_the_negative_prompts_prediction_of_masked_text(
    name: str, config: dict[str, Any], length: int, masks: str
) -> None:
    family = components.FAMILIES[name]
    text, negative = family.text(2), family.text(1, length, seed=3)
    if masks in ("negative", "none"):
        text = TextConditions(text.embeds)
    if masks in ("prompt", "none"):
        negative = TextConditions(negative.embeds)
    assert_negative_is_recovered(family.denoiser(**config), text, negative)


def test_a_gain_of_minus_1_holds_with_a_lora_on_every_layer(family: components.Family) -> None:
    """The negative prompt passes the adapters as well."""
    down = (
        {"down_block_types": ("DownBlock2D",) * 2} if family is components.FAMILIES["unet"] else {}
    )
    denoiser = family.denoiser(**down)
    sites = Backbone.of(denoiser).sites()
    linear = [n for n, m in denoiser.named_modules() if isinstance(m, torch.nn.Linear)]
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=linear, init_lora_weights=False)
    inject_adapter_in_model(config, denoiser)
    assert Backbone.of(denoiser).sites() == sites
    assert_negative_is_recovered(denoiser, family.text(2), family.text(1, 5, seed=3))


def test_texts_of_one_length_are_compared_by_their_means_where_they_are_padded_on_the_left() -> (
    None
):
    """As in training, where other lengths bring a mask."""
    family = components.FAMILIES["cogview4"]
    denoiser, latents, embeds = family.denoiser(), family.latents(2), family.text(2).embeds
    guide = FixedGuide(GuideOutput(text_gain=torch.full((2, 1, 1), 0.5)))
    negative = TextConditions(family.text(1, seed=3).embeds)
    made = guided(denoiser, guide, latents, TextConditions(embeds), negative)
    means = embeds + 0.5 * (embeds - negative.embeds.mean(1, keepdim=True))
    torch.testing.assert_close(made, plain(denoiser, latents, TextConditions(means)))


def test_what_is_masked_does_not_count() -> None:
    family = components.FAMILIES["pixart"]
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, 0.5)))
    negative = family.text(1, seed=3)
    changed = TextConditions(negative.embeds.clone(), mask=negative.mask)
    changed.embeds[:, -1] = 9.0
    one, other = (guided(denoiser, guide, latents, text, n) for n in (negative, changed))
    torch.testing.assert_close(one, other)


def test_a_gain_of_0_changes_nothing_and_others_do(family: components.Family) -> None:
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    expected, negative = plain(denoiser, latents, text), family.text(1, 5, seed=3)
    for gain in (0.0, 0.5):
        guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, gain)))
        made = guided(denoiser, guide, latents, text, negative)
        assert torch.equal(made, expected) == (gain == 0)
    for name, gains in equal_gains(denoiser, 0.5).items():
        made = guided(
            denoiser, FixedGuide(GuideOutput(gains={name: gains})), latents, text, negative
        )
        assert not torch.allclose(made, expected, atol=1e-6), name


def test_a_layer_that_is_left_out_has_a_gain_of_0(family: components.Family) -> None:
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    negative, gains = family.text(1, 5, seed=3), equal_gains(denoiser, 0.5)
    for left_out in gains:
        zero = {**gains, left_out: 0 * gains[left_out]}
        others = {name: gain for name, gain in gains.items() if name != left_out}
        one, other = (
            guided(denoiser, FixedGuide(GuideOutput(gains=g)), latents, text, negative)
            for g in (zero, others)
        )
        torch.testing.assert_close(one, other)


def test_each_head_and_each_sample_has_a_gain_of_its_own(family: components.Family) -> None:
    denoiser, latents, text = family.denoiser(), family.latents(2), family.text(2)
    expected, negative = plain(denoiser, latents, text), family.text(2, seed=3)
    name, heads = Backbone.of(denoiser).sites()["attention"][0]
    made = []
    for head in range(heads):
        gains = torch.zeros(2, heads)
        gains[0, head] = 0.5
        guide = FixedGuide(GuideOutput(gains={name: gains}))
        made.append(guided(denoiser, guide, latents, text, negative))
        assert torch.equal(made[-1][1], expected[1])
        assert not torch.allclose(made[-1][0], expected[0])
    assert not torch.allclose(made[0], made[1])


def test_gradients_reach_the_gains_with_and_without_checkpointing(
    family: components.Family,
) -> None:
    found = []
    for checkpointing in (False, True):
        denoiser = family.denoiser().requires_grad_(False)
        if checkpointing:
            denoiser.train().enable_gradient_checkpointing(checkpoint_in_pass)
        gains = equal_gains(denoiser, 0.3)
        guide = FixedGuide(GuideOutput(gains={k: v.requires_grad_() for k, v in gains.items()}))
        backbone = Backbone.of(denoiser)
        backbone.install(guide)
        negative = family.text(1, 5, seed=3)
        with GuidedPass(guide, lambda: 4.0, lambda n=negative: n).open():
            made = backbone(family.latents(2), TIME, family.text(2))
        made.square().mean().backward()
        found.append([gain.grad for gain in gains.values()])
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert one.any()
        torch.testing.assert_close(one, other)


# -- which layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", UNET_SHAPES)
def test_every_cross_attention_layer_of_middle_and_decoder_is_found(
    config: dict[str, Any],
) -> None:
    """Also where the way up has more layers than the way down (SSD-1B)."""
    unet = components.unet(**config)
    there = [n for n, _ in unet.named_modules() if n.endswith("attn2") and "down" not in n]
    assert sorted(n for n, _ in Backbone.of(unet).sites()["attention"]) == sorted(there)
    if "reverse_transformer_layers_per_block" in config:
        assert len(there) == 1 + 2 * 3 + 2 * 2


@pytest.mark.parametrize("config", [*UNET_SHAPES, {"mid_block_type": "UNetMidBlock2D"}])
def test_pooled_text_enters_every_residual_layer(config: dict[str, Any]) -> None:
    unet = components.unet(**config)
    there = [n for n, m in unet.named_modules() if isinstance(m, ResnetBlock2D)]
    assert sorted(Backbone.of(unet).sites()["modulation"]) == sorted(there)
    for other in ({"addition_embed_type": None}, {"time_embedding_act_fn": "silu"}):
        without = components.unet(**config, **other)
        assert Backbone.of(without).sites()["modulation"] == []


def test_custom_diffusion_is_refused() -> None:
    unet = components.unet()
    name, _ = Backbone.of(unet).sites()["attention"][0]
    unet.get_submodule(name).processor.to_k_custom_diffusion = torch.nn.Identity()
    with pytest.raises(GuideError, match="Custom Diffusion"):
        Backbone.of(unet).install(FixedGuide(GuideOutput(gains=equal_gains(unet, 0.5))))
    assert count_hooks(unet) == 0


def test_fused_projections_work_or_are_noticed(family: components.Family) -> None:
    noticed = [components.FAMILIES[n] for n in ("sd3", "aura-flow", "chroma", "flux2")]
    sd3 = family is components.FAMILIES["sd3"]
    denoiser = family.denoiser(**({"dual_attention_layers": ()} if sd3 else {}))
    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, 0.5)))
    given = family.latents(2), family.text(2), family.text(1, seed=3)
    expected = guided(denoiser, guide, *given)
    if not hasattr(denoiser, "fuse_qkv_projections"):
        return
    denoiser.fuse_qkv_projections()
    if family in noticed:
        with pytest.raises(GuideError, match=r"went past .*transformer_blocks\.0\.attn"):
            guided(denoiser, guide, *given)
    else:
        made = guided(denoiser, guide, *given)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
