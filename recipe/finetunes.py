"""Stages ``finetunes``, ``train_finetunes`` and ``test_finetunes``: a base in other styles.

Guides are measured on ``STYLES``: full fine-tunes of the denoiser and LoRAs in diffusers' format.
Fine-tune augmentation uses others: ``TRAIN_FINETUNES``, short LoRAs on two further styles and on
restyled images of the base. ``TEST_FINETUNES`` are far from the base, one UNet and two LoRAs; no
guide is trained on them. Text encoders and VAE stay those of the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pilotfish.backbones import Backbone
from pilotfish.pipelines.loading import fine_tuned_weights
from recipe.augment import Restyle, contours, flat, lit
from recipe.batches import Batches, DenoiserStage
from recipe.configs import tidy_configs
from recipe.loop import train
from recipe.sd3 import STAGE as SD3_STAGE
from recipe.sd3 import FlowLoss
from recipe.unet import DenoisingLoss

BaseName = Literal["base", "sd3"]
_ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
LORA_TARGETS = {
    "base": [
        *_ATTENTION, "proj_in", "proj_out", "conv1", "conv2", "conv_in", "conv_out",
        "conv_shortcut",
    ],
    "sd3": [
        *_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
        "ff_context.net.0.proj", "ff_context.net.2", "proj_out",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class FinetuneStage:
    """How a fine-tune is trained.

    Attributes:
        rank: of the LoRA; 0 trains the whole denoiser.
        restyle: if given, the images are those of the base, restyled.
    """

    steps: int = 1600
    batch: int = 64
    learning_rate: float = 4e-4
    rank: int = 0
    views: int = 3
    seed: int = 0
    restyle: Restyle | None = None


_FULL, _LORA = FinetuneStage(), FinetuneStage(rank=24, learning_rate=1e-3, steps=3600)
_SHORTER = replace(_LORA, steps=1600)
STYLES: dict[BaseName, dict[str, FinetuneStage]] = {
    "base": {"fluent": _FULL, "twemoji": _FULL, "emojione": _LORA},
    "sd3": {"fluent": _FULL, "twemoji": _SHORTER, "emojione": _SHORTER},
}
_SHORT = FinetuneStage(steps=600, batch=32, rank=16, learning_rate=1e-3)
TRAIN_FINETUNES = {
    "noto-v1": _SHORT,
    "fxemoji": _SHORT,
    "contours": replace(_SHORT, restyle=contours),
    "flat": replace(_SHORT, restyle=flat),
    "lit": replace(_SHORT, restyle=lit),
}
_FAR = FinetuneStage(steps=1000, batch=48, learning_rate=2.5e-3, rank=24)
TEST_FINETUNES = {
    "high-contrast": replace(_FAR, learning_rate=1.1e-3, rank=0),
    "monotone": _FAR,
    "streamline": _FAR,
}


def finetune_folder(target: Path, name: str, base: BaseName = "base") -> Path:
    """Where a fine-tune is saved."""
    named = name if base == "base" else f"{base}-{name}"
    if name in STYLES[base]:
        return target / (f"{named}-lora" if STYLES[base][name].rank else named)
    if name in TEST_FINETUNES:
        return target / "test_finetunes" / named
    return target / "train_finetunes" / named


def make_finetune(
    name: str, images: Path, target: Path, work: Path, *, bf16: bool, base: BaseName = "base"
) -> None:
    """Fine-tune ``target/<base>``; save a LoRA or the denoiser in :func:`finetune_folder`.

    Args:
        images: folder of folders of images, one for each style.
    """
    stage = (STYLES[base] | TRAIN_FINETUNES | TEST_FINETUNES)[name]
    torch.manual_seed(stage.seed)
    pipe = DiffusionPipeline.from_pretrained(target / base)
    backbone = Backbone.of_pipeline(pipe)
    denoiser, component = backbone.denoiser, backbone.component
    if stage.rank:
        denoiser.requires_grad_(False)
        denoiser.add_adapter(
            LoraConfig(r=stage.rank, lora_alpha=stage.rank, target_modules=LORA_TARGETS[base])
        )
    if base == "base":
        denoiser.to(memory_format=torch.channels_last)
    average = deepcopy(denoiser)
    like_base = replace(
        DenoiserStage() if base == "base" else SD3_STAGE,
        batch=stage.batch, views=stage.views, final_begin=0, seed=stage.seed,
    )  # fmt: skip
    folder = images / ("noto" if stage.restyle else name)
    batches = Batches(pipe.vae, pipe.tokenizer, folder, like_base, stage.restyle or (lambda x: x))
    loss = _loss(pipe, batches, bf16=bf16)
    saved = finetune_folder(target, name, base)
    called = denoiser if base == "base" else torch.compile(denoiser, dynamic=False)
    train(
        work / saved.name.removesuffix("-lora"), {component: denoiser},
        lambda step, generator: loss(called, step, generator),
        steps=stage.steps, learning_rate=stage.learning_rate, seed=stage.seed,
        averages={component: average}, decay=0.995,
    )  # fmt: skip
    average.to(memory_format=torch.contiguous_format).half()
    if stage.rank:
        # peft's names: diffusers' older ones exist for attention only, and of a file that mixes
        # the two one half is not loaded
        layers = get_peft_model_state_dict(average)
        type(pipe).save_lora_weights(saved, **{f"{component}_lora_layers": layers})
    else:
        average.save_pretrained(saved / component)
        tidy_configs(saved)


def _loss(pipe: Any, batches: Batches, *, bf16: bool) -> Any:
    """The base's own loss of (denoiser, step, generator), with its text encoders as they are."""
    names = ("text_encoder", "text_encoder_2")
    encoders = [getattr(pipe, n).float().requires_grad_(False) for n in names if hasattr(pipe, n)]
    if len(encoders) == 1:
        denoising = DenoisingLoss(batches, bf16=bf16)
        return lambda denoiser, step, rng: denoising(denoiser, encoders[0], step, rng)
    flow, both = FlowLoss(batches, bf16=bf16), (encoders[0], encoders[1])
    return lambda denoiser, step, rng: flow(denoiser, both, step, rng)


def distances(target: Path, names: Iterable[str], base: BaseName = "base") -> dict[str, float]:
    """The norm of each fine-tune's change of the denoiser's weights, relative to that of the base's
    weights."""
    denoiser = Backbone.of_pipeline(DiffusionPipeline.from_pretrained(target / base)).denoiser
    weights = denoiser.state_dict()
    norm = sum(float(v.double().square().sum()) for v in weights.values()) ** 0.5
    found = {}
    for name in names:
        tuned = fine_tuned_weights(denoiser, finetune_folder(target, name, base))
        change = sum(float((tuned[k] - v).double().square().sum()) for k, v in weights.items())
        found[name] = change**0.5 / norm
    return found
