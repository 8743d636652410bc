"""One denoiser in diffusers and in ComfyUI, small and random, and what draws with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import comfy.model_patcher
import comfy.samplers
import torch
from diffusers import AutoencoderKL
from pilotfish_comfyui.loading import GuideModule, apply_guide

from pilotfish.guides import TinyGuide

SIDE, STEPS, W = 8, 4, 4.0
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Prompt:
    """Embeddings of n prompts, as both take them."""

    embeds: torch.Tensor
    pooled: torch.Tensor

    def conditioning(self, **more: Any) -> list[Any]:
        """ComfyUI's."""
        return [[self.embeds, {"pooled_output": self.pooled, **more}]]


class Kind(ABC):
    """A layout of one family that both implementations express."""

    name: str
    prediction: str
    takes_pooled: bool
    """Whether the denoiser is given pooled text."""
    joint_attention: ClassVar[bool]
    """Whether its text and image attend to each other."""
    bound: ClassVar[float]
    """Largest difference of latents in float32: sums are in another order."""

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """That of diffusers, with no parameter at zero."""

    @abstractmethod
    def load(self, dtype: torch.dtype | None = None) -> Any:
        """The same as a new model of ComfyUI, in float32 or another precision."""

    @cached_property
    def loaded(self) -> Any:
        return self.load()

    def model(self) -> Any:
        """A model as ComfyUI's nodes give it: branches of a workflow are clones of one, and keep
        the weights without LoRA in one place."""
        return self.loaded.clone()

    def guide(self, untrained: bool = False, **settings: Any) -> TinyGuide:
        return guide_for(self.denoiser, self.prediction, untrained, **settings)

    def guided(self, refresh: int = 0, **settings: Any) -> Any:
        """A model with a guide."""
        return apply_guide(self.model(), on_comfyui(self.guide(**settings)), refresh)

    # -- prompts and latents --------------------------------------------------------------

    @property
    @abstractmethod
    def widths(self) -> tuple[int, int]:
        """Of the text's embeddings and of the pooled text."""

    @property
    def channels(self) -> int:
        return int(self.denoiser.config.in_channels)

    def prompt(self, seed: int, n: int = 1, tokens: int = 7) -> Prompt:
        generator = torch.Generator().manual_seed(seed)
        width, pooled = self.widths
        return Prompt(
            torch.randn(n, tokens, width, generator=generator),
            torch.randn(n, pooled, generator=generator),
        )

    def prompts(self, n: int = 1) -> tuple[Prompt, Prompt]:
        """n prompts and one negative prompt."""
        return self.prompt(5, n), self.prompt(2)

    def conditionings(self, n: int = 1) -> tuple[Any, Any]:
        """ComfyUI's of :meth:`prompts`."""
        prompt, negative = self.prompts(n)
        return prompt.conditioning(), negative.conditioning()

    # -- diffusers --------------------------------------------------------------------------

    @cached_property
    def pipeline(self) -> Any:
        """A pipeline of diffusers that is given embeddings."""
        vae = AutoencoderKL(
            block_out_channels=(2, 2, 2, 2), norm_num_groups=1, latent_channels=self.channels,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        pipe = self.new_pipeline(vae)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @abstractmethod
    def new_pipeline(self, vae: AutoencoderKL) -> Any: ...

    def first_latents(self, noise: torch.Tensor, pipe: Any) -> torch.Tensor:
        """What a pipeline is given for the noise that ComfyUI is given."""
        return noise

    # -- what comes with a model ------------------------------------------------------------

    @abstractmethod
    def values(self) -> tuple[tuple[str, str], torch.Tensor]:
        """The values of one attention layer: their names in a LoRA's file (first factor, second
        factor), and their weight in the loaded model."""

    def lora(self) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
        """A LoRA on these values, their weight, and by how much it changes."""
        generator, (names, weight) = torch.Generator().manual_seed(7), self.values()
        down, up = (
            0.2 * torch.randn(*size, generator=generator)
            for size in ((4, weight.shape[1]), (weight.shape[0], 4))
        )
        return dict(zip(names, (down, up), strict=True)), weight, up @ down

    @abstractmethod
    def control(self) -> tuple[Any, int]:
        """A ControlNet as ComfyUI's nodes give it, and the side of its images."""


def randomise(module: torch.nn.Module, by: float, seed: int = 4) -> Any:
    """Change every parameter, so that none is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return module.eval().requires_grad_(False)


def guide_for(
    denoiser: Any, prediction: str, untrained: bool = False, by: float = 0.05, **settings: Any
) -> TinyGuide:
    """A guide whose five parts all act; an untrained one changes nothing."""
    torch.manual_seed(1)
    usual = {"rank": 4, "condition_on_negative": True, "uncond_templates": 2}
    made = TinyGuide.for_denoiser(
        denoiser, prediction, trained_on={"name": "small base"}, **usual | settings
    )
    return made.eval() if untrained else randomise(made, by)


def on_comfyui(guide: TinyGuide) -> Any:
    """A guide as *Load guide* gives it."""
    return comfy.model_patcher.ModelPatcher(GuideModule(guide), load_device=CPU, offload_device=CPU)


def count_rows(model: Any) -> tuple[Any, list[int]]:
    """A clone that notes the images of every denoiser call, and its list."""
    rows: list[int] = []

    def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
        rows.append(len(given["input"]))
        return function(given["input"], given["timestep"], **given["c"])

    model = model.clone()
    model.set_model_unet_function_wrapper(call)
    return model, rows


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(9))


def draw_diffusers(
    kind: Kind, pipe: Any, prompt: Prompt, negative: Prompt, w: float, n: int = 1
) -> torch.Tensor:
    """The latents of a call."""
    side = SIDE * pipe.vae_scale_factor
    pooled = {
        "pooled_prompt_embeds": prompt.pooled,
        "negative_pooled_prompt_embeds": negative.pooled.expand(n, -1),
    }
    return pipe(
        prompt_embeds=prompt.embeds, guidance_scale=w,
        negative_prompt_embeds=negative.embeds.expand(n, -1, -1),
        latents=kind.first_latents(noise(n, kind.channels, SIDE, SIDE), pipe),
        num_inference_steps=STEPS, output_type="latent", height=side, width=side,
        **(pooled if kind.takes_pooled else {}),
    ).images  # fmt: skip


def draw_comfyui(
    model: Any, positive: Any, negative: Any, cfg: float, steps: int = STEPS, n: int = 1,
    sampler: str = "euler", guider: Any = None, image: Any = None, mask: Any = None,
) -> torch.Tensor:  # fmt: skip
    """The latents of a sampling by the scheduler *normal*, as the denoiser sees them."""
    guider = guider or comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    if image is None:
        image = torch.zeros(n, model.model.latent_format.latent_channels, SIDE, SIDE)
    sampling = model.get_model_object("model_sampling")
    made = guider.sample(
        noise(*image.shape), image, comfy.samplers.sampler_object(sampler),
        comfy.samplers.calculate_sigmas(sampling, "normal", steps), denoise_mask=mask,
        disable_pbar=True, seed=3,
    )  # fmt: skip
    return model.model.process_latent_in(made)


def report(what: str, theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """The largest difference, printed as well."""
    most = float((theirs - ours).abs().max())
    print(f"\n{what}: maximum difference {most:.2g}, values up to {theirs.abs().max():.3g}")
    return most
