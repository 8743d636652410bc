"""Pipelines from a folder or hub id, whole and in one precision."""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pilotfish.errors import in_brief


class PipelineError(ValueError):
    """A pipeline cannot be loaded; the message names it."""


def load_pipeline(pretrained_model_name_or_path: str | Path) -> Any:
    """A pipeline in float32, from safetensors only, without a progress bar.

    Raises:
        PipelineError: there is none, or it cannot be read.
    """
    try:
        pipe = DiffusionPipeline.from_pretrained(
            pretrained_model_name_or_path, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"no pipeline could be loaded from {pretrained_model_name_or_path}: {in_brief(error)}"
        ) from error
    for part in pipe.components.values():
        # left alone, transformers loads what was saved in half precision as halves, diffusers
        # as whole numbers, and the first pass fails
        if isinstance(part, PreTrainedModel):
            part.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def take_ddim_steps(pipe: Any) -> None:
    """Give a pipeline, in place of whatever scheduler it came with, the steps of stage 2: DDIM
    on an even grid that ends at the clean picture."""
    # DDIM's own default clips, which is for pixels; a solver without that setting has none to give
    given = {"clip_sample": False, **pipe.scheduler.config}
    pipe.scheduler = DDIMScheduler.from_config(given, timestep_spacing="trailing")


def sibling(pipe: Any) -> Any:
    """A pipeline on the same weights, for another thread.

    What a call or a guide changes is its own: the scheduler, the tokenizers (which keep how they
    last padded) and the denoiser's modules, where hooks sit. Weights take memory once.
    """
    shared = {id(tensor): tensor for tensor in (*pipe.unet.parameters(), *pipe.unet.buffers())}
    own = {"scheduler": deepcopy(pipe.scheduler), "unet": deepcopy(pipe.unet, shared)}
    for name, part in pipe.components.items():
        if isinstance(part, PreTrainedTokenizerBase):
            own[name] = deepcopy(part)
    other = copy(pipe)  # from_pipe would cast what is shared
    for name, part in own.items():
        setattr(other, name, part)
    return other


def fine_tuned_weights(
    base: UNet2DConditionModel, pretrained_model_name_or_path: str | Path
) -> dict[str, torch.Tensor]:
    """The weights of a fine-tune of ``base``, by the base's own names.

    Args:
        pretrained_model_name_or_path: folder or hub id of a pipeline or a UNet, or folder of a
            LoRA in diffusers' format.

    Raises:
        PipelineError: there is none, or it is no fine-tune of this base.
    """
    where = pretrained_model_name_or_path
    try:
        if (Path(where) / LORA_WEIGHT_NAME_SAFE).is_file():
            tuned = deepcopy(base)
            tuned.load_lora_adapter(
                str(where), prefix="unet", weight_name=LORA_WEIGHT_NAME_SAFE, use_safetensors=True
            )
            tuned.fuse_lora()
            tuned.unload_lora()
        elif (Path(where) / "config.json").is_file():
            tuned = UNet2DConditionModel.from_pretrained(where, use_safetensors=True)
        else:
            tuned = UNet2DConditionModel.from_pretrained(
                where, subfolder="unet", use_safetensors=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise PipelineError(
            f"no fine-tune could be loaded from {where}: {in_brief(error)}"
        ) from error
    weights: dict[str, torch.Tensor] = tuned.state_dict()
    shapes = {k: v.shape for k, v in base.state_dict().items()}
    if differs := sorted(k for k, v in shapes.items() if k not in weights or weights[k].shape != v):
        raise PipelineError(f"{where} is no fine-tune of this base; they differ in {differs[0]}")
    return weights
