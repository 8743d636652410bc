"""What layers make of the negative prompt is made once a call, and anew where it may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pilotfish import TinyGuide
from pilotfish.backbones import GuidedPass, install
from pilotfish.backbones.extrapolation import Pushing
from pilotfish.guides import Guide
from pilotfish.interface import TextConditions

STEPS = 4


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How often a module runs; its class does the counting, for a patched one is not kept."""
    calls, plain = [0], type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return plain.forward(self, *args, **kwargs)

    module.__class__ = type(plain.__name__, (plain,), {"forward": forward})
    try:
        yield calls
    finally:
        module.__class__ = plain


def pushing(unet: UNet2DConditionModel, randomise: Callable[[Guide], Guide]) -> Guide:
    return randomise(TinyGuide.for_denoiser(unet, "epsilon"))


def keys(unet: UNet2DConditionModel) -> Any:
    return unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k


def with_lora(pipe: StableDiffusionPipeline) -> None:
    config = LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False)
    torch.manual_seed(3)
    pipe.unet.add_adapter(config, "drawn")


def sample(pipe: StableDiffusionPipeline, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents: torch.Tensor = pipe(
        "cat", guidance_scale=4.0, num_inference_steps=STEPS, output_type="latent",
        generator=generator, **more,
    ).images  # fmt: skip
    return latents


def denoise(unet: UNet2DConditionModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 8, 16, generator=generator)
    made: torch.Tensor = unet(latents, torch.tensor(500), text).sample
    return made


def passing(guide: Guide, *negatives: TextConditions) -> GuidedPass:
    """One that is given each of the negative prompts in turn, over and over."""
    turns = cycle(negatives)
    return GuidedPass(guide, lambda: 4.0, lambda: next(turns))


@pytest.mark.parametrize(
    "layer", [keys, lambda unet: unet.add_embedding.proj], ids=["keys", "pooled text"]
)
def test_the_negative_prompt_is_looked_at_once_a_call(
    pipe: StableDiffusionPipeline, randomise: Callable[[Guide], Guide],
    layer: Callable[[UNet2DConditionModel], nn.Module],
) -> None:  # fmt: skip
    guide = pushing(pipe.unet, randomise)
    with guide.attached(pipe), counted(layer(pipe.unet)) as calls:
        sample(pipe, negative_prompt="dog")
        assert calls == [STEPS + 1]
        sample(pipe, negative_prompt="cat")
        assert calls == [2 * (STEPS + 1)]


def test_each_call_has_a_negative_prompt_of_its_own(
    pipe: StableDiffusionPipeline, randomise: Callable[[Guide], Guide]
) -> None:
    guide = pushing(pipe.unet, randomise)
    with guide.attached(pipe):
        dog, cat, again = (sample(pipe, negative_prompt=n) for n in ("dog", "cat", "dog"))
    assert torch.equal(dog, again)
    assert not torch.allclose(dog, cat)


def test_a_pass_that_is_given_another_negative_prompt_answers_to_that_one(
    unet: UNet2DConditionModel, randomise: Callable[[Guide], Guide]
) -> None:
    guide = pushing(unet, randomise)
    install(guide, unet)
    negatives = [TextConditions(torch.randn(1, 8, 16)) for _ in range(2)]
    with torch.no_grad():
        with passing(guide, *negatives).open():
            both = [denoise(unet) for _ in negatives]
        for negative, made in zip(negatives, both, strict=True):
            with passing(guide, negative).open():
                assert torch.equal(denoise(unet), made)


def test_an_adapter_that_is_turned_down_on_the_way_is_heeded(
    pipe: StableDiffusionPipeline, randomise: Callable[[Guide], Guide],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with_lora(pipe)
    guide = pushing(pipe.unet, randomise)

    def turn(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe.unet.set_adapters("drawn", 1.0 - step / STEPS)
        return given

    def turned() -> torch.Tensor:
        pipe.unet.set_adapters("drawn", 1.0)
        return sample(pipe, callback_on_step_end=turn)

    assert isinstance(keys(pipe.unet), BaseTunerLayer)
    with guide.attached(pipe):
        made = turned()
        monkeypatch.setattr(Pushing, "_keep", lambda _, name, modules, make: make())
        assert torch.equal(made, turned())


def test_a_hook_on_the_keys_is_heeded(
    pipe: StableDiffusionPipeline, randomise: Callable[[Guide], Guide]
) -> None:
    guide, seen = pushing(pipe.unet, randomise), []
    with guide.attached(pipe):
        handle = keys(pipe.unet).register_forward_hook(lambda *_: seen.append(1))
        sample(pipe, negative_prompt="dog")
        handle.remove()
    assert len(seen) == 2 * STEPS


def test_another_forward_of_the_keys_is_heeded(
    pipe: StableDiffusionPipeline, randomise: Callable[[Guide], Guide]
) -> None:
    guide, seen, layer = pushing(pipe.unet, randomise), [], keys(pipe.unet)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return len(seen) * type(layer).forward(layer, hidden)

    layer.forward = forward
    with guide.attached(pipe):
        sample(pipe, negative_prompt="dog")
    assert len(seen) == 2 * STEPS


def test_another_denoiser_in_the_same_pass_answers_for_itself(
    make_unet: Callable[..., UNet2DConditionModel], randomise: Callable[[Guide], Guide]
) -> None:
    unets = [make_unet(), make_unet(seed=1)]
    guide, negative = pushing(unets[0], randomise), TextConditions(torch.randn(1, 8, 16))
    for unet in unets:
        install(guide, unet)

    def run(*which: UNet2DConditionModel) -> torch.Tensor:
        with torch.no_grad(), passing(guide, negative).open():
            return [denoise(unet) for unet in which][-1]

    assert torch.equal(run(*unets), run(unets[1]))


def test_nothing_is_kept_when_the_pass_is_closed(
    unet: UNet2DConditionModel, randomise: Callable[[Guide], Guide]
) -> None:
    guide = pushing(unet, randomise)
    install(guide, unet)
    guided = passing(guide, TextConditions(torch.randn(1, 8, 16)))
    with counted(keys(unet)) as calls, torch.no_grad():
        for _ in range(2):
            with guided.open():
                denoise(unet)
    assert calls == [4]


def test_nothing_is_kept_while_something_learns(
    unet: UNet2DConditionModel, randomise: Callable[[Guide], Guide]
) -> None:
    guide = pushing(unet, randomise)
    install(guide, unet)
    with counted(keys(unet)) as calls, passing(guide, TextConditions(torch.randn(1, 8, 16))).open():
        denoise(unet)
        denoise(unet)
    assert calls == [4]


def test_one_prompt_serves_all_where_all_are_the_same() -> None:
    torch.manual_seed(0)
    states, pooled = torch.randn(1, 8, 16), torch.randn(3, 12)
    alike = states.repeat(3, 1, 1)
    assert len(TextConditions(alike).shared()) == 1
    assert torch.equal(TextConditions(alike).shared().hidden_states, states)
    assert len(TextConditions(alike, pooled[:1].repeat(3, 1)).shared()) == 1
    assert len(TextConditions(alike, pooled).shared()) == 3
    assert len(TextConditions(torch.randn(3, 8, 16)).shared()) == 3
