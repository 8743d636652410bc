"""What layers make of the negative prompt is cached for one call where it cannot change."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pilotfish import TinyGuide
from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.backbones.cache import TABLE_BYTES, CallCache
from pilotfish.guides import Guide
from pilotfish.interface import GuideOutput, TextConditions
from tests import components
from tests.backbones.stubs import TIME, FixedGuide, TextReadsItself, equal_gains
from tests.pipelines import pipelines

STEPS = 4
PROJECTIONS = {
    "aura-flow": "context_embedder",
    "flux2": "context_embedder",
    "unet": "mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
    "ltx": "caption_projection",
    "chroma": "context_embedder",
    "cogview4": "patch_embed.text_proj",
    "lumina2": "time_caption_embed.caption_embedder",
    "pixart": "caption_projection",
    "qwen": "txt_norm",
    "sana": "caption_projection",
    "z-image": "cap_embedder",
    "wan": "condition_embedder.text_embedder",
    "sd3": "context_embedder",
}
"""A module that the negative prompt passes alone."""


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How often a module runs. Its class counts, since a patched module is not cached."""
    calls, original = [0], type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return original.forward(self, *args, **kwargs)

    module.__class__ = type(original.__name__, (original,), {"forward": forward})
    try:
        yield calls
    finally:
        module.__class__ = original


@pytest.fixture
def guide(pipe: StableDiffusionPipeline) -> TinyGuide:
    return components.randomise(TinyGuide.for_denoiser(pipe.unet, "epsilon"))


def keys(denoiser: nn.Module) -> Any:
    return denoiser.get_submodule(PROJECTIONS["unet"])


def sample(pipe: StableDiffusionPipeline, **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents: torch.Tensor = pipe(
        "cat", guidance_scale=4.0, num_inference_steps=STEPS, output_type="latent",
        generator=generator, **call,
    ).images  # fmt: skip
    return latents


def opened(guide: Guide, *negatives: TextConditions) -> GuidedPass:
    """One that is given each of the negative prompts in turn, over and over."""
    turns = cycle(negatives)
    return GuidedPass(guide, lambda: 4.0, lambda: next(turns))


# -- on every family ---------------------------------------------------------------------------


def prepared(family: components.Family, seed: int = 0) -> tuple[Any, TinyGuide]:
    """A denoiser with a trained guide installed."""
    denoiser = family.denoiser(seed=seed)
    guide = TinyGuide.for_denoiser(denoiser, family.prediction_type, rank=4, head=4)
    components.randomise(guide)
    Backbone.of(denoiser).install(guide)
    return denoiser, guide


def call(family: components.Family, denoiser: Any) -> torch.Tensor:
    return Backbone.of(denoiser)(family.latents(2), TIME, family.text(2))


def projection(family: components.Family, denoiser: Any) -> nn.Module:
    names = {id(f): PROJECTIONS[name] for name, f in components.FAMILIES.items()}
    module: nn.Module = denoiser.get_submodule(names[id(family)])
    return module


def test_the_negative_prompt_is_projected_once_while_the_pass_is_open(
    family: components.Family,
) -> None:
    denoiser, guide = prepared(family)
    negative = family.text(1, 5, seed=3)
    guided = opened(guide, negative)
    with counted(projection(family, denoiser)) as calls, torch.no_grad():
        for expected in (3, 6):  # nothing stays when it is closed
            with guided.open():
                one, other = call(family, denoiser), call(family, denoiser)
            assert calls == [expected]
            assert torch.equal(one, other)


def test_another_negative_prompt_in_the_same_pass_counts(family: components.Family) -> None:
    denoiser, guide = prepared(family)
    negatives = [family.text(1, 5, seed=seed) for seed in (3, 4)]
    with torch.no_grad():
        with opened(guide, *negatives).open():
            both = [call(family, denoiser) for _ in negatives]
        for negative, made in zip(negatives, both, strict=True):
            with opened(guide, negative).open():
                assert torch.equal(call(family, denoiser), made)
    assert not torch.allclose(*both)


def test_two_denoisers_in_one_pass_have_caches_of_their_own(family: components.Family) -> None:
    (one, guide), other = prepared(family), family.denoiser(seed=1)
    Backbone.of(other).install(guide)

    def last(*denoisers: Any) -> torch.Tensor:
        with torch.no_grad(), opened(guide, family.text(1, 5, seed=3)).open():
            return [call(family, denoiser) for denoiser in denoisers][-1]

    assert torch.equal(last(one, other), last(other))


def test_texts_are_gone_after_the_call(family: components.Family) -> None:
    denoiser, guide = prepared(family)
    backbone, text, negative = Backbone.of(denoiser), family.text(2), family.text(1, 5, seed=3)
    guided = opened(guide, negative)
    with torch.no_grad(), guided.open():
        for _ in range(2):
            backbone(family.latents(2), TIME, text)
    kept = [weakref.ref(one.embeds) for one in (text, negative)]
    del text, negative, guided
    gc.collect()
    assert [one() for one in kept] == [None, None]


def test_nothing_is_cached_while_gradients_are_computed(family: components.Family) -> None:
    denoiser, guide = prepared(family)
    with (
        counted(projection(family, denoiser)) as calls,
        opened(guide, family.text(1, 5, seed=3)).open(),
    ):
        call(family, denoiser)
        call(family, denoiser)
    assert calls == [4]


@torch.no_grad()
def test_what_is_too_large_for_all_steps_is_made_for_as_many_as_fit() -> None:
    cache, schedule, made = CallCache(), torch.arange(7.0), list[int]()
    text = components.FAMILIES["sd3"].text(1)

    def make(timesteps: torch.Tensor) -> list[torch.Tensor]:
        made.append(len(timesteps))
        return [timesteps, 2 * timesteps]

    def at(place: int, size: int) -> Any:
        cache.find_table(schedule, place, 4.0, text, 1, lambda t: t, torch.device("cpu"))
        return cache.at_step(size, make, lambda: (), lambda: size)

    for place in range(7):
        assert at(place, TABLE_BYTES // 3) == (place, 2 * place)
    assert made == [3, 3, 1]
    assert at(4, TABLE_BYTES // 2) == (4, 8)  # as where an image is changed
    assert at(5, TABLE_BYTES // 2) == (5, 10)
    assert at(3, 0) == (3, 6)
    assert made == [3, 3, 1, 2, 7]
    assert at(3, TABLE_BYTES + 1) is None


# -- a stream that is made for all steps, with a LoRA ------------------------------------------


@torch.no_grad()
def test_a_gain_of_minus_1_holds_with_a_cached_stream_and_a_lora_on_every_layer() -> None:
    """Over a schedule, and over the next one at another scale of the LoRA."""
    family = components.FAMILIES["sd3"]
    denoiser, text, negative = family.denoiser(), family.text(2), family.text(1, 5, seed=3)
    for block in denoiser.transformer_blocks:
        block.attn.set_processor(TextReadsItself())
    linear = [n for n, m in denoiser.named_modules() if isinstance(m, nn.Linear)]
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=linear, init_lora_weights=False)
    inject_adapter_in_model(config, denoiser)
    timesteps, latents = torch.tensor([900.0, 500, 100]), family.latents(2)

    def schedule(given: TextConditions) -> torch.Tensor:
        made = [
            denoiser(latents, given.embeds, given.pooled, t.expand(2), return_dict=False)[0]
            for t in timesteps
        ]
        return torch.stack(made)

    guide = FixedGuide(GuideOutput(gains=equal_gains(denoiser, -1.0)), negative_stream="cached")
    Backbone.of(denoiser).install(guide)
    guided = GuidedPass(guide, lambda: 4.0, lambda: negative, timesteps=lambda: timesteps)
    found = []
    for scale in (1.0, 0.25):
        for module in denoiser.modules():
            if isinstance(module, BaseTunerLayer):
                module.set_scale("default", scale)
        found.append(schedule(negative.expand(2)))
        with guided.open():
            made = schedule(text)
        # float32 rounds more where random LoRAs enlarge every layer's output
        torch.testing.assert_close(made, found[-1], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(*found, atol=1e-2)


def test_a_cached_stream_is_of_the_lora_as_it_is_in_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is loaded, scaled and deleted between two calls of a pipeline."""
    one = pipelines.build("SD3")
    guide = pipelines.guide("SD3", condition_on_negative=True, negative_stream="cached")
    config = LoraConfig(
        r=2, target_modules=["add_k_proj", "add_v_proj"], lora_alpha=16, init_lora_weights=False
    )

    def turned() -> list[torch.Tensor]:
        made = [one.latents()]
        torch.manual_seed(3)
        one.denoiser.add_adapter(config, "drawn")
        made.append(one.latents())
        one.denoiser.set_adapters("drawn", 0.25)
        made.append(one.latents())
        one.denoiser.delete_adapters("drawn")
        return [*made, one.latents()]

    with guide.attached(one.pipe, refresh=0):
        made = turned()
        monkeypatch.setattr(CallCache, "at_step", lambda *_: None)
        for found, expected in zip(made, turned(), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    first, loaded, scaled, last = made
    torch.testing.assert_close(first, last, atol=1e-5, rtol=1e-4)
    for a, b in ((first, loaded), (loaded, scaled), (first, scaled)):
        assert not torch.allclose(a, b, atol=1e-3)


# -- in a pipeline -----------------------------------------------------------------------------


@pytest.mark.parametrize("module", [keys, lambda unet: unet.add_embedding.proj])
def test_each_call_of_a_pipeline_caches_its_own_negative_prompt(
    pipe: StableDiffusionPipeline, guide: TinyGuide, module: Callable[[Any], nn.Module]
) -> None:
    with guide.attached(pipe), counted(module(pipe.unet)) as calls:
        dog, cat, again = (sample(pipe, negative_prompt=n) for n in ("dog", "cat", "dog"))
    assert calls == [3 * (STEPS + 1)]
    assert torch.equal(dog, again)
    assert not torch.allclose(dog, cat)


def test_an_adapter_that_a_callback_scales_is_not_cached(
    pipe: StableDiffusionPipeline, guide: TinyGuide, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    pipe.unet.add_adapter(config, "drawn")
    assert isinstance(keys(pipe.unet), BaseTunerLayer)

    def turn(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe.unet.set_adapters("drawn", 1.0 - step / STEPS)
        return given

    def turned() -> torch.Tensor:
        pipe.unet.set_adapters("drawn", 1.0)
        return sample(pipe, callback_on_step_end=turn)

    with guide.attached(pipe):
        made = turned()
        monkeypatch.setattr(CallCache, "made_by", lambda self, module, make, parts=(): make())
        assert torch.equal(made, turned())


def test_a_hook_or_another_forward_of_the_keys_runs_at_every_step(
    pipe: StableDiffusionPipeline, guide: TinyGuide
) -> None:
    runs, layer = [], keys(pipe.unet)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        runs.append(1)
        return len(runs) * type(layer).forward(layer, hidden)

    with guide.attached(pipe):
        handle = layer.register_forward_hook(lambda *_: runs.append(1))
        sample(pipe, negative_prompt="dog")
        handle.remove()
        assert len(runs) == 2 * STEPS
        layer.forward = forward
        sample(pipe, negative_prompt="dog")
        assert len(runs) == 4 * STEPS
