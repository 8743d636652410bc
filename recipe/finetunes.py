"""Stage 4, ``finetunes``: the base in other artists' styles, as the community makes them.

Two full fine-tunes of the UNet and one LoRA in diffusers' format. Text encoder and VAE
stay the base's.

Beside them the practice fine-tunes, on which guides learn to be moved: two further artists, and
the base's own pictures redrawn in three ways, all of them LoRAs and quickly made; and three
further away, whole UNets that are made and not carried, for the guides for few steps. None of the
fine-tunes on which guides are measured takes part in training one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from pilotfish.data.images import load_images
from pilotfish.pipelines.loading import fine_tuned_weights
from recipe.augment import (
    Restyle,
    draw_bulged,
    draw_contours,
    draw_flat,
    draw_lit,
    draw_squashed,
    draw_waved,
)
from recipe.denoiser import BaseStage, DenoisingLoss, categories_of, latent_views, tokenize
from recipe.loop import train

LORA_TARGETS = [
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out",
    "conv1", "conv2", "conv_in", "conv_out", "conv_shortcut",
]  # fmt: skip


@dataclass(frozen=True)
class FinetuneStage:
    """How a style is learnt.

    Attributes:
        rank: of the LoRA; 0 trains all of the UNet.
        restyle: if given, the pictures are the base's own, restyled.
        exchanged: whether the names within each category change places, so that a guide cannot
            know by heart what a name looks like.
    """

    steps: int = 1600
    batch: int = 64
    learning_rate: float = 4e-4
    rank: int = 0
    views: int = 3
    seed: int = 0
    restyle: Restyle | None = None
    exchanged: bool = False


STYLES = {
    "fluent": FinetuneStage(),
    "twemoji": FinetuneStage(),
    "emojione": FinetuneStage(rank=24, learning_rate=1e-3, steps=3600),
}
PRACTISED = FinetuneStage(steps=600, batch=32, rank=16, learning_rate=1e-3)
PRACTICE = {
    "noto-v1": PRACTISED,
    "fxemoji": PRACTISED,
    "contours": replace(PRACTISED, restyle=draw_contours),
    "flat": replace(PRACTISED, restyle=draw_flat),
    "lit": replace(PRACTISED, restyle=draw_lit),
}
FURTHER = FinetuneStage(steps=500, batch=48, learning_rate=8e-4)
FAR = {
    "bulged": replace(FURTHER, restyle=draw_bulged),
    "waved": replace(FURTHER, restyle=draw_waved, exchanged=True),
    "squashed": replace(FURTHER, restyle=draw_squashed),
}
"""Practice fine-tunes further from the base than ``PRACTICE``, in work and not carried."""


def finetune_folder(target: Path, style: str) -> Path:
    """Where a fine-tune lies: the name of a host's says whether it is a LoRA."""
    if style in PRACTICE:
        return target / "practice" / style
    return target / (f"{style}-lora" if STYLES[style].rank else style)


def far_folder(work: Path, style: str) -> Path:
    """Where a fine-tune that is not carried lies."""
    return work / "practice" / style


def make_finetune(
    style: str, pictures: Path, base: Path, work: Path, target: Path, stage: FinetuneStage, *,
    bf16: bool,
) -> None:  # fmt: skip
    """Learn the style of ``pictures/<style>``; save a LoRA in ``target``, or the whole UNet in
    ``target/unet``."""
    torch.manual_seed(stage.seed)
    pipe = StableDiffusionPipeline.from_pretrained(base)
    folder = pictures / ("noto" if stage.restyle else style)
    encoder, unet = pipe.text_encoder.float(), pipe.unet
    encoder.requires_grad_(False)
    if stage.rank:
        unet.requires_grad_(False)
        unet.add_adapter(
            LoraConfig(r=stage.rank, lora_alpha=stage.rank, target_modules=LORA_TARGETS)
        )
    unet.to(memory_format=torch.channels_last)
    average = deepcopy(unet)
    like_base = replace(BaseStage(), batch=stage.batch, views=stage.views, settle=0)
    latents = latent_views(
        pipe.vae, folder, stage.views, stage.seed, stage.restyle or (lambda x: x)
    )
    if stage.exchanged:
        latents = latents[exchanged(categories_of(folder))]
    objective = DenoisingLoss(
        latents, tokenize(pipe.tokenizer, load_images(folder).captions),
        categories_of(folder), tokenize(pipe.tokenizer, [""]), like_base, bf16=bf16,
    )  # fmt: skip
    train(
        work / style, {"unet": unet},
        lambda step, generator: objective(unet, encoder, step, generator),
        steps=stage.steps, learning_rate=stage.learning_rate, seed=stage.seed,
        averages={"unet": average}, decay=0.995,
    )  # fmt: skip
    average.to(memory_format=torch.contiguous_format).half()
    if stage.rank:
        # peft's own names: diffusers' older ones exist for attention alone, and a file that
        # mixes the two loses half of itself on loading
        layers = get_peft_model_state_dict(average)
        StableDiffusionPipeline.save_lora_weights(target, unet_lora_layers=layers)
    else:
        average.save_pretrained(target / "unet")
        config = target / "unet" / "config.json"
        facts = json.loads(config.read_text())
        facts.pop("_name_or_path")  # where it began, on the machine that trained it
        config.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


def exchanged(categories: Sequence[str]) -> list[int]:
    """For each place the place of another of its category, or by chance its own: a permutation."""
    generator, places = torch.Generator().manual_seed(7), list(range(len(categories)))
    for category in dict.fromkeys(categories):
        members = [i for i, c in enumerate(categories) if c == category]
        order = torch.randperm(len(members), generator=generator).tolist()
        for mine, other in zip(members, order, strict=True):
            places[mine] = members[other]
    return places


def distances(target: Path, work: Path) -> dict[str, float]:
    """How far every fine-tune lies from the base: the length of the change of its UNet's weights,
    that of the base's being 1. Those of ``FAR`` are in ``work``."""
    unet = StableDiffusionPipeline.from_pretrained(target / "base").unet
    base = unet.state_dict()
    length = sum(float(v.double().square().sum()) for v in base.values()) ** 0.5
    found = {}
    places = {style: finetune_folder(target, style) for style in (*STYLES, *PRACTICE)}
    places |= {style: far_folder(work, style) for style in FAR}
    for style, place in places.items():
        tuned = fine_tuned_weights(unet, place)
        change = sum(float((tuned[k] - v).double().square().sum()) for k, v in base.items())
        found[style] = change**0.5 / length
    return found
