"""Stage ``scorer``: a small CLIP over all styles, for retrieval accuracy and ``fd_clip``.

It is a plain ``transformers.CLIPModel`` and takes no part in training a guide.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from pilotfish.data.images import from_pixels, load_images
from recipe.augment import affine, degrade
from recipe.loop import train
from recipe.text import TOKENS, new_tokenizer, tokenize
from recipe.vocabulary import COLOURS, captions


@dataclass(frozen=True)
class ScorerStage:
    """How the scorer is trained.

    Attributes:
        batch: names a step, each in two styles.
    """

    steps: int = 2500
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 1


def new_scorer(vocabulary_size: int, bos: int, eos: int) -> CLIPModel:
    """(N, 3, 64, 64) images and (N, 16) tokens -> 128 features each."""
    shared = {"num_attention_heads": 4, "projection_dim": 128}
    vision = shared | {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4,
        "image_size": 64, "patch_size": 8,
    }  # fmt: skip
    text = shared | {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "vocab_size": vocabulary_size, "max_position_embeddings": TOKENS,
        "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos,
    }  # fmt: skip
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def make_scorer(images: Path, work: Path, target: Path, stage: ScorerStage) -> None:
    """Train contrastively: two styles of a name and its text are each other's positives."""
    torch.manual_seed(stage.seed)
    styles = [load_images(folder) for folder in sorted(images.iterdir())]
    data = torch.stack([from_pixels(s.pixels) for s in styles])  # (styles, N, 3, 64, 64)
    tokenizer = new_tokenizer([*captions(), *COLOURS])
    tokens = tokenize(tokenizer, styles[0].captions)
    scorer = new_scorer(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    average = deepcopy(scorer)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        names = torch.randperm(data.shape[1], generator=generator)[: stage.batch]
        pick = torch.rand(2, data.shape[0], stage.batch, generator=generator).argsort(1)[:, 0]
        pixels = torch.cat([data[style, names] for style in pick])
        pixels = affine(pixels, generator, shift=0.12, scale=0.25, turn=0.2)
        pooled = scorer.vision_model(degrade(pixels, generator)).pooler_output
        one, two = F.normalize(scorer.visual_projection(pooled), dim=1).chunk(2)
        pooled = scorer.text_model(tokens[names]).pooler_output
        text = F.normalize(scorer.text_projection(pooled), dim=1)
        scale = scorer.logit_scale.exp().clamp(max=50)
        labels = torch.arange(stage.batch)
        losses = [
            F.cross_entropy(scale * a @ b.T, labels) + F.cross_entropy(scale * b @ a.T, labels)
            for a, b in ((one, text), (two, text), (one, two))
        ]
        return torch.stack(losses).mean() / 2

    train(
        work / "scorer", {"scorer": scorer}, loss, steps=stage.steps, weight_decay=0.1,
        learning_rate=stage.learning_rate, seed=stage.seed, averages={"scorer": average},
    )  # fmt: skip
    image_processor = CLIPImageProcessorPil(
        size={"height": 64, "width": 64}, crop_size={"height": 64, "width": 64},
        do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    average.half().save_pretrained(target)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(target)
