"""Modular pipelines of diffusers on the tiny random components of the standard ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.wan import encoders
from diffusers.utils import is_ftfy_available

from pilotfish import PilotfishGuidance
from tests.pipelines import pipelines as standard

if not is_ftfy_available():  # which Wan's text encoder asks
    encoders.prompt_clean = str.strip

BLOCKS = {
    "SDXL": "StableDiffusionXLAutoBlocks",
    "SDXL ControlNet": "StableDiffusionXLAutoBlocks",
    "SD3": "StableDiffusion3AutoBlocks",
    "Qwen-Image": "QwenImageAutoBlocks",
    "Qwen-Image edit": "QwenImageEditAutoBlocks",
    "Wan": "WanBlocks",
    "Wan 2.2": "Wan22Blocks",
    "Z-Image": "ZImageAutoBlocks",
}
NAMES = [name for name in BLOCKS if name not in ("SDXL ControlNet", "Qwen-Image edit")]
NEGATIVE = ["a dog", "red"]
W = 4.0


@dataclass
class Modular:
    """A modular pipeline, and the standard one on the same components."""

    name: str
    pipe: Any
    one: standard.Pipeline

    @property
    def scale(self) -> float:
        """Of the standard pipeline's call, that means W."""
        return W - 1 if self.name == "Z-Image" else W

    def use(self, guider: Any, guider_2: Any = None) -> None:
        """Give it a guider; Wan 2.2 two."""
        second = {"guider_2": guider_2 or guider} if self.name == "Wan 2.2" else {}
        self.pipe.update_components(guider=guider, **second)

    def latents(self, guider: Any = None, steps: int = 3, **call: Any) -> torch.Tensor:
        """The final latents, from fixed noise."""
        if guider is not None:
            self.use(*(guider if isinstance(guider, tuple) else (guider,)))
        given = self._call(steps) | call
        found: torch.Tensor = self.pipe(**given, output="latents")
        return found

    def attached(self, guide: Any, refresh: Any, steps: int = 3) -> torch.Tensor:
        """Those of the standard pipeline with the guide attached."""
        given = self._call(steps) | {"output_type": "latent"} | dict(self.one.call)
        given["true_cfg_scale" if self.name == "Qwen-Image" else "guidance_scale"] = self.scale
        if self.name == "Wan 2.2":
            given["guidance_scale_2"] = W
        with guide.attached(self.one.pipe, refresh=refresh):
            found: torch.Tensor = self.one.pipe(**given)[0]
        if self.name == "Qwen-Image":
            side, packing = standard.SIDE, self.one.pipe.vae_scale_factor
            found = self.one.pipe._unpack_latents(found, side, side, packing)
        return found

    def conditional(self) -> torch.Tensor:
        """Without guidance. Of Wan the text encoder fails where no negative prompt is wanted."""
        return self.latents(ClassifierFreeGuidance(guidance_scale=W, stop=0.0))

    def cfg(self) -> torch.Tensor:
        return self.latents(ClassifierFreeGuidance(guidance_scale=W))

    @contextmanager
    def batches(self) -> Iterator[list[int]]:
        """The batch size of every call of the denoisers, as the pipeline makes it."""
        sizes: list[int] = []

        def note(module: Any, args: Any, kwargs: Any) -> None:
            names = ("sample", "hidden_states", "x")
            sizes.append(len(args[0] if args else next(kwargs[n] for n in names if n in kwargs)))

        handles = [d.register_forward_pre_hook(note, with_kwargs=True) for d in self.one.denoisers]
        try:
            yield sizes
        finally:
            for handle in handles:
                handle.remove()

    def _call(self, steps: int) -> dict[str, Any]:
        call = {"height": standard.SIDE, "width": standard.SIDE} | self.one.call
        call.pop("guidance_scale_2", None)
        if "num_frames" in call:  # as many latent frames as those of the standard pipeline
            call["num_frames"] = 2
        return call | {
            "prompt": list(standard.PROMPTS), "negative_prompt": NEGATIVE,
            "num_inference_steps": steps, "generator": torch.Generator().manual_seed(5),
        }  # fmt: skip


def build(name: str) -> Modular:
    """A fresh one."""
    one = standard.build(name)
    blocks = getattr(diffusers, BLOCKS[name])()
    if "Wan" not in name:  # which sizes its latents by the decoder
        blocks.sub_blocks.pop("decode")
    pipe = blocks.init_pipeline()
    wanted = {spec.name for spec in blocks.expected_components}
    parts = {k: v for k, v in one.pipe.components.items() if k in wanted and v is not None}
    pipe.update_components(**parts)
    if name == "Wan 2.2":
        pipe.update_components(boundary_ratio=standard.PIPELINES[name].boundary_ratio)
    pipe.set_progress_bar_config(disable=True)
    return Modular(name, pipe, one)


def guider(modular: Modular, folder: Any, **config: Any) -> PilotfishGuidance:
    """One for the guide in a folder, at W, without refreshes."""
    return PilotfishGuidance(
        str(folder), **{"guidance_scale": modular.scale, "refresh": 0} | config
    )
