"""Stages ``finetunes``, ``train_finetunes`` and ``test_finetunes``: the base in other styles.

Guides are measured on ``STYLES``: two full fine-tunes of the UNet and one LoRA in diffusers'
format. Fine-tune augmentation uses others: ``TRAIN_FINETUNES``, short LoRAs on two further
styles and on restyled images of the base. ``TEST_FINETUNES`` are far from the base, one UNet and
two LoRAs; no guide is trained on them. Text encoder and VAE stay those of the base.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pilotfish.pipelines.loading import fine_tuned_weights
from recipe.augment import Restyle, contours, flat, lit
from recipe.batches import Batches, DenoiserStage
from recipe.configs import tidy_configs
from recipe.loop import train
from recipe.unet import DenoisingLoss

LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut",
]  # fmt: skip


@dataclass(frozen=True)
class FinetuneStage:
    """How a fine-tune is trained.

    Attributes:
        rank: of the LoRA; 0 trains the whole UNet.
        restyle: if given, the images are those of the base, restyled.
    """

    steps: int = 1600
    batch: int = 64
    learning_rate: float = 4e-4
    rank: int = 0
    views: int = 3
    seed: int = 0
    restyle: Restyle | None = None


STYLES = {
    "fluent": FinetuneStage(),
    "twemoji": FinetuneStage(),
    "emojione": FinetuneStage(rank=24, learning_rate=1e-3, steps=3600),
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


def finetune_folder(target: Path, name: str) -> Path:
    """Where a fine-tune is saved."""
    if name in STYLES:
        return target / (f"{name}-lora" if STYLES[name].rank else name)
    if name in TEST_FINETUNES:
        return target / "test_finetunes" / name
    return target / "train_finetunes" / name


def make_finetune(name: str, images: Path, target: Path, work: Path, *, bf16: bool) -> None:
    """Fine-tune ``target/base``; save a LoRA or the UNet in :func:`finetune_folder`.

    Args:
        images: folder of folders of images, one for each style.
    """
    stage = (STYLES | TRAIN_FINETUNES | TEST_FINETUNES)[name]
    torch.manual_seed(stage.seed)
    pipe = StableDiffusionPipeline.from_pretrained(target / "base")
    folder = images / ("noto" if stage.restyle else name)
    encoder, unet = pipe.text_encoder.float(), pipe.unet
    encoder.requires_grad_(False)
    if stage.rank:
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(r=stage.rank, lora_alpha=stage.rank, target_modules=LORA_TARGETS)
        )
    unet.to(memory_format=torch.channels_last)
    average = deepcopy(unet)
    like_base = replace(
        DenoiserStage(), batch=stage.batch, views=stage.views, final_begin=0, seed=stage.seed
    )
    batches = Batches(pipe.vae, pipe.tokenizer, folder, like_base, stage.restyle or (lambda x: x))
    objective = DenoisingLoss(batches, bf16=bf16)
    train(
        work / name, {"unet": unet},
        lambda step, generator: objective(unet, encoder, step, generator),
        steps=stage.steps, learning_rate=stage.learning_rate, seed=stage.seed,
        averages={"unet": average}, decay=0.995,
    )  # fmt: skip
    average.to(memory_format=torch.contiguous_format).half()
    saved = finetune_folder(target, name)
    if stage.rank:
        # peft's names: diffusers' older ones exist for attention only, and of a file that mixes
        # the two one half is not loaded
        layers = get_peft_model_state_dict(average)
        StableDiffusionPipeline.save_lora_weights(saved, unet_lora_layers=layers)
    else:
        average.save_pretrained(saved / "unet")
        tidy_configs(saved)


def distances(target: Path, names: Iterable[str]) -> dict[str, float]:
    """The norm of each fine-tune's change of the UNet's weights, relative to that of the base's
    weights."""
    unet = StableDiffusionPipeline.from_pretrained(target / "base").unet
    base = unet.state_dict()
    norm = sum(float(v.double().square().sum()) for v in base.values()) ** 0.5
    found = {}
    for name in names:
        tuned = fine_tuned_weights(unet, finetune_folder(target, name))
        change = sum(float((tuned[k] - v).double().square().sum()) for k, v in base.items())
        found[name] = change**0.5 / norm
    return found
