"""The operators that a guided pass runs beyond a plain one.

On a fast accelerator a pass at batch 1 is bound by kernel launches, so the number of operators
tells what a guide costs there. Every operator that PyTorch dispatches is counted except views
and allocations, which launch nothing. Fused attention is one operator.

The count depends on the layers of a denoiser and not on their widths, so a published shape is
counted on a copy a tenth as wide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.shapes import Shape
from pilotfish.backbones import Backbone, GuidedPass
from pilotfish.guides import Guide
from pilotfish.interface import TextConditions

NO_KERNEL = ("aten._unsafe_view", "aten.empty", "aten.new_empty", "prim.")
"""Beginnings of the names of operators that are no views and launch nothing all the same."""
WIDTH = 32
"""Of the text and of its pooled form, for a narrow pipeline."""


@dataclass(frozen=True)
class OperatorCount:
    """Operators of one denoiser pass, and what a guide adds to it.

    Attributes:
        plain: of a pass without guidance.
        added: by a guide, in every step.
        once: by a guide, once a call, whatever the number of steps. The negative prompt's
            encoding is among them where the pipeline encodes it.
        plain_views: views and allocations of a pass without guidance.
        added_views: views and allocations by a guide, in every step.
        by_operator: ``added`` by operator, the most frequent first.
    """

    plain: int
    added: int
    once: int
    plain_views: int
    added_views: int
    by_operator: dict[str, int] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of the operators of a plain pass, what a guide adds in every step."""
        return self.added / self.plain


class OperatorCounter(TorchDispatchMode):
    """Counts operators by name while it is active.

    Attributes:
        operators: those that compute something.
        views: views and allocations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.views: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        no_kernel = func.is_view or name.startswith(NO_KERNEL)
        (self.views if no_kernel else self.operators)[name] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def count_operators(pipe: Any, guide: Guide, guidance_scale: float = 4.0) -> OperatorCount:
    """Count what a guide adds to a pipeline at batch 1.

    What a call of three steps runs beyond a call of two is one step. The scheduler's part is the
    same with and without a guide.
    """
    with operators_of(pipe.unet) as denoiser:
        _call(pipe, None, 1.0, 1)
    guided, plain = (
        {n: _call(pipe, g, w, n) for n in (2, 3)} for g, w in ((guide, guidance_scale), (None, 1.0))
    )

    def step(calls: dict[int, OperatorCounter], counter: str) -> Counter[str]:
        difference = Counter(getattr(calls[3], counter))
        difference.subtract(getattr(calls[2], counter))
        return difference

    added, added_views = step(guided, "operators"), step(guided, "views")
    added.subtract(step(plain, "operators"))
    added_views.subtract(step(plain, "views"))
    in_two_steps = guided[2].operators.total() - plain[2].operators.total()
    return OperatorCount(
        plain=denoiser.operators.total(), added=added.total(),
        once=in_two_steps - 2 * added.total(),
        plain_views=denoiser.views.total(), added_views=added_views.total(),
        by_operator={name.removesuffix(".default"): n for name, n in added.most_common() if n},
    )  # fmt: skip


def count_shape(shape: Shape, make_guide: Callable[..., Guide]) -> OperatorCount:
    """Count what a fresh guide adds to a pass of a published shape at batch 1.

    Args:
        make_guide: of a denoiser and its prediction type.
    """
    if shape.denoiser is UNet2DConditionModel:
        pipe = narrow_pipeline(shape)
        return count_operators(pipe, make_guide(pipe.unet, shape.prediction_type).eval())
    torch.manual_seed(0)
    denoiser: Any = shape.denoiser(**{**shape.config, **shape.narrow}).eval()
    guide = make_guide(denoiser, shape.prediction_type).eval()
    return count_transformer(denoiser, guide, masked=shape.masked, pooled=shape.pooled is not None)


@torch.no_grad()
def count_transformer(
    denoiser: Any, guide: Guide, *, masked: bool = False, pooled: bool = False
) -> OperatorCount:
    """Count what a guide adds to a pass of a transformer at batch 1, whatever pipeline calls it.

    What three calls in one guided pass run beyond two is one step, as in :func:`count_operators`.

    Args:
        masked: whether the denoiser is given a mask of the prompt's tokens.
        pooled: whether it is given pooled text.
    """
    backbone = Backbone.of(denoiser)
    sites = backbone.sites()
    prompt = TextConditions(
        torch.zeros(1, 32, sites["text_dim"]),
        torch.zeros(1, sites["pooled_dim"]) if pooled else None,
        torch.ones(1, 32, dtype=torch.long) if masked else None,
    )
    *channels, _, _ = backbone.latent_shape()
    # more tokens than joint attention samples, as in images of full size
    latents = torch.zeros(1, *channels[:1], *[1] * len(channels[1:]), 36, 36)
    times = torch.tensor([0.75, 0.5, 0.25])
    schedule = times * backbone.num_train_timesteps

    def run(steps: int, guided: bool) -> OperatorCounter:
        place = 0
        hooks = backbone.install(guide) if guided else None
        passed = GuidedPass(
            guide,
            lambda: 4.0,
            lambda: prompt,
            hooks=hooks,
            timesteps=lambda: schedule,
            step=lambda: place,
        )
        try:
            with passed.open() if guided else nullcontext(), OperatorCounter() as counter:
                for place in range(steps):
                    backbone(latents, times[place : place + 1], prompt)
        finally:
            if hooks is not None:
                hooks.remove()
        return counter

    plain, two, three = run(1, False), run(2, True), run(3, True)
    added, views = Counter(three.operators), Counter(three.views)
    for counter in (two, plain):
        added.subtract(counter.operators)
        views.subtract(counter.views)
    return OperatorCount(
        plain=plain.operators.total(), added=added.total(),
        once=two.operators.total() - 2 * (plain.operators.total() + added.total()),
        plain_views=plain.views.total(), added_views=views.total(),
        by_operator={name.removesuffix(".default"): n for name, n in added.most_common() if n},
    )  # fmt: skip


def narrow_pipeline(shape: Shape) -> Any:
    """A pipeline without text encoders and VAE, its denoiser with all layers of a shape, a tenth
    as wide, with random weights."""
    config = dict(shape.config)
    config["block_out_channels"] = tuple(max(c // 10, 4) for c in config["block_out_channels"])
    heads = config["attention_head_dim"]
    config |= {
        "norm_num_groups": 4, "sample_size": 16, "cross_attention_dim": WIDTH,
        "attention_head_dim": 2 if isinstance(heads, int) else (2,) * len(heads),
    }  # fmt: skip
    large = "addition_embed_type" in config
    if large:
        config |= {
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
        }  # fmt: skip
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**config).eval()
    scheduler = DDIMScheduler(
        prediction_type=shape.prediction_type, clip_sample=False, steps_offset=1
    )
    if large:
        return StableDiffusionXLPipeline(
            None, None, None, None, None, unet, scheduler, add_watermarker=False
        )
    return StableDiffusionPipeline(
        None, None, None, unet, scheduler, None, None, requires_safety_checker=False
    )


def _call(pipe: Any, guide: Guide | None, guidance_scale: float, steps: int) -> OperatorCounter:
    """The operators of one call of a pipeline."""
    pipe.set_progress_bar_config(disable=True)
    prompt = _embeddings(pipe) if pipe.text_encoder is None else {"prompt": "owl"}
    guided = guide.attached(pipe, refresh=0) if guide else nullcontext()
    with guided, OperatorCounter() as counter:
        pipe(
            **prompt, guidance_scale=guidance_scale, num_inference_steps=steps,
            output_type="latent", generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
    return counter


def _embeddings(pipe: Any) -> dict[str, torch.Tensor]:
    """What a pipeline without text encoders is given in place of prompts."""
    text = torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)
    given = {"prompt_embeds": text, "negative_prompt_embeds": text.clone()}
    if isinstance(pipe, StableDiffusionXLPipeline):
        pooled = torch.zeros(1, WIDTH)
        given |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled.clone()}
    return given


@contextmanager
def operators_of(denoiser: torch.nn.Module) -> Iterator[OperatorCounter]:
    """Counts the operators of every forward pass of a denoiser inside the block."""
    counter = OperatorCounter()

    def enter(*_: Any) -> None:
        counter.__enter__()

    def leave(*_: Any) -> None:
        counter.__exit__(None, None, None)

    handles = [
        denoiser.register_forward_pre_hook(enter), denoiser.register_forward_hook(leave),
    ]  # fmt: skip
    try:
        yield counter
    finally:
        for handle in handles:
            handle.remove()
