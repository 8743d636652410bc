"""Stage ``autoencoder``: a small AutoencoderKL (f = 8) over all four styles."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from pilotfish.data.images import from_pixels, load_images
from recipe.augment import affine
from recipe.loop import train


@dataclass(frozen=True)
class AutoencoderStage:
    """How the autoencoder is trained.

    Attributes:
        steps: optimiser steps.
        batch: images a step.
        kl: weight of the KL term; it is small and only keeps the latents from drifting.
    """

    steps: int = 2800
    batch: int = 16
    learning_rate: float = 1e-3
    kl: float = 1e-5
    seed: int = 0
    bf16: bool = False


def new_autoencoder() -> AutoencoderKL:
    """(N, 3, 64, 64) images <-> (N, 8, 8, 8) latents, 1.9 M parameters."""
    channels = (32, 48, 64, 96)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=8,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


def image_loss(made: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """L1 and squared error on pixels, and L1 on differences of neighbours for sharp edges."""
    error = made - real
    down = error[:, :, 1:] - error[:, :, :-1]
    right = error[:, :, :, 1:] - error[:, :, :, :-1]
    return error.abs().mean() + 0.5 * (down.abs().mean() + right.abs().mean()) + error.pow(2).mean()


@torch.no_grad()
def normalize_latents(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Give every latent channel mean 0 and standard deviation 1, folded into the two 1x1
    convolutions beside the latents, so that stock pipelines work as they are."""
    z = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    size = len(mean)
    out, back = vae.quant_conv, vae.post_quant_conv
    out.weight[:size] /= std.view(-1, 1, 1, 1)
    out.bias[:size] = (out.bias[:size] - mean) / std
    out.bias[size:] -= 2 * std.log()
    back.bias += (back.weight[:, :, 0, 0] * mean).sum(1)
    back.weight *= std.view(1, -1, 1, 1)


def make_autoencoder(images: Path, work: Path, target: Path, stage: AutoencoderStage) -> None:
    """Train, normalise the latents, save to ``target`` in half precision."""
    torch.manual_seed(stage.seed)
    data = torch.cat([from_pixels(load_images(f).pixels) for f in sorted(images.iterdir())])
    vae = new_autoencoder().to(memory_format=torch.channels_last)

    def loss(step: int, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(data), (stage.batch,), generator=generator)
        x = affine(data[pick], generator, shift=0.1).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=stage.bf16):
            posterior = vae.encode(x).latent_dist
            made = vae.decode(posterior.sample(generator)).sample
        return image_loss(made.float(), x) + stage.kl * posterior.kl().mean()

    train(
        work / "autoencoder", {"vae": vae}, loss,
        steps=stage.steps, learning_rate=stage.learning_rate, seed=stage.seed,
    )  # fmt: skip
    vae.eval()
    normalize_latents(vae, data)
    with torch.no_grad():
        held = data[::7]
        mse = F.mse_loss(vae.decode(vae.encode(held).latent_dist.mean).sample.clamp(-1, 1), held)
    print(f"reconstruction PSNR {10 * torch.log10(4 / mse):.1f} dB")
    vae.half().save_pretrained(target)
