"""Pipelines from a folder or hub id, whole and in one precision; the weights of fine-tunes."""

from __future__ import annotations

from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.pipelines import pipeline_utils
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase

from pilotfish.backbones import Backbone
from pilotfish.backbones.origin import COMPONENTS
from pilotfish.errors import in_brief
from pilotfish.guidances import Guidance
from pilotfish.noise import deterministic_scheduler

DTYPE = "dtype" if hasattr(pipeline_utils, "_resolve_dtype") else "torch_dtype"
"""The argument of diffusers' ``from_pretrained``, whose name has changed."""


class PipelineError(ValueError):
    """A pipeline cannot be loaded; the message names it."""


def load_pipeline(
    pretrained_model_name_or_path: str | Path, *, variant: str | None = None,
    dtype: torch.dtype = torch.float32, vae_dtype: torch.dtype | None = None,
    denoiser: bool = True,
) -> Any:  # fmt: skip
    """A pipeline in one precision, from safetensors only, without a progress bar.

    Args:
        variant: of the weight files, such as ``fp16``.
        dtype: of every network.
        vae_dtype: of the VAE, if it is another.
        denoiser: False leaves the denoiser without weights, on the meta device, until
            :func:`load_denoiser`.

    Raises:
        PipelineError: there is none, or it cannot be read; it names the variants that are there.
    """
    where = Path(pretrained_model_name_or_path)
    check_pipeline(pretrained_model_name_or_path)
    try:
        given = {} if denoiser else _without_weights(pretrained_model_name_or_path)
        pipe = DiffusionPipeline.from_pretrained(
            pretrained_model_name_or_path, use_safetensors=True, variant=variant,
            **{DTYPE: {"default": dtype, "vae": vae_dtype or dtype}}, **given,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        there = _variants(where)
        hint = f"; it holds the variant {there[0]}: pass it as variant" if there else ""
        raise PipelineError(
            f"no pipeline could be loaded from {pretrained_model_name_or_path}: "
            f"{in_brief(error)}{hint}"
        ) from error
    for name, part in pipe.components.items():
        # some parts are kept in float32 by diffusers or transformers, and the first pass fails
        if isinstance(part, nn.Module):
            nn.Module.to(part, (vae_dtype or dtype) if name == "vae" else dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_pipeline(pretrained_model_name_or_path: str | Path) -> None:
    """Whether there is a pipeline; of its files only the index is read.

    Raises:
        PipelineError: there is none.
    """
    where = Path(pretrained_model_name_or_path)
    if where.is_file():
        raise PipelineError(
            f"{where} is a single file; make a folder of it once, with its pipeline's class: "
            f"StableDiffusionPipeline.from_single_file(file).save_pretrained(folder)"
        )
    try:
        DiffusionPipeline.load_config(pretrained_model_name_or_path)
    except (OSError, ValueError) as error:
        raise PipelineError(
            f"no pipeline could be loaded from {pretrained_model_name_or_path}: {in_brief(error)}"
        ) from error


def load_denoiser(
    pipe: Any, pretrained_model_name_or_path: str | Path, variant: str | None = None
) -> None:  # fmt: skip
    """Give a pipeline of :func:`load_pipeline` the weights of its denoiser.

    Raises:
        PipelineError: they cannot be read.
    """
    for name, backbone in Backbone.all_of_pipeline(pipe).items():
        net = backbone.denoiser
        try:
            loaded = type(net).from_pretrained(
                pretrained_model_name_or_path, subfolder=name, variant=variant,
                use_safetensors=True, **{DTYPE: net.dtype},
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise PipelineError(
                f"no {name} could be loaded from {pretrained_model_name_or_path}: {in_brief(error)}"
            ) from error
        pipe.register_modules(**{name: nn.Module.to(loaded, net.dtype)})


def _without_weights(where: str | Path) -> dict[str, nn.Module]:
    """A pipeline's denoisers on the meta device, by the names of its components."""
    known: dict[str, Any] = {
        kind.__name__: kind for family in Backbone.registry for kind in family.denoisers
    }
    found = {}
    for name, entry in DiffusionPipeline.load_config(where).items():
        if name in COMPONENTS and entry[1] in known:
            kind = known[entry[1]]
            with torch.device("meta"):
                found[name] = kind.from_config(kind.load_config(where, subfolder=name))
    return found


def _variants(folder: Path) -> list[str]:
    """Variants of the weight files in a pipeline's folder."""
    stems = {path.name.removesuffix(".safetensors") for path in folder.glob("*/*.safetensors")}
    return sorted({stem.rpartition(".")[2] for stem in stems if "." in stem})


def use_deterministic_scheduler(pipe: Any) -> None:
    """Replace a pipeline's scheduler with the deterministic one of its noise path, whose steps
    guides for few steps are distilled to: see :func:`pilotfish.noise.deterministic_scheduler`.

    Where the pipeline's call takes no times (Wan), the scheduler has them; a pipeline that was
    saved and loaded needs this function again.
    """
    even = not Backbone.of_pipeline(pipe).takes_times
    pipe.scheduler = deterministic_scheduler(pipe.scheduler, even)


def share_weights(pipe: Any) -> Any:
    """A pipeline on the same weights, for another thread.

    What a call or a guide changes is its own: the scheduler, the tokenizers (which keep how they
    last padded) and the denoiser's modules, where hooks are. Weights take memory once. A guide on
    ``pipe`` is attached to the other as well.
    """
    own = {"scheduler": deepcopy(pipe.scheduler)}
    for name, backbone in Backbone.all_of_pipeline(pipe).items():
        tensors = (*backbone.denoiser.parameters(), *backbone.denoiser.buffers())
        own[name] = deepcopy(backbone.denoiser, {id(tensor): tensor for tensor in tensors})
    for name, part in pipe.components.items():
        if isinstance(part, PreTrainedTokenizerBase):
            own[name] = deepcopy(part)
    other = copy(pipe)  # from_pipe would cast what is shared
    for name, part in own.items():
        setattr(other, name, part)
    return other


def weaker_denoiser(guidance: Guidance, backbone: Backbone) -> Any:
    """The denoiser of ``guidance.weak_model``, on the device and in the precision of a base; None
    where the guidance has none.

    Raises:
        PipelineError: it cannot be loaded, or it is no denoiser of the same latents and texts.
    """
    where, base = guidance.weak_model, backbone.denoiser
    if where is None:
        return None
    alone = (Path(where) / "config.json").is_file()
    subfolder = {} if alone else {"subfolder": backbone.component}
    try:
        weak: Any = type(base).from_pretrained(where, use_safetensors=True, **subfolder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise PipelineError(
            f"no weaker model could be loaded from {where}: {in_brief(error)}"
        ) from error
    mine, theirs = (Backbone.of(x).sites() for x in (base, weak))
    for name, a, b in (
        ("texts of width", mine["text_dim"], theirs["text_dim"]),
        ("latents of channels", mine["head"]["channels"], theirs["head"]["channels"]),
    ):
        if a != b:
            raise PipelineError(f"the weaker model {where} takes {name} {b}, the base {a}")
    return nn.Module.to(weak.eval().requires_grad_(False), base.device, base.dtype)


def fine_tuned_weights(
    base: Any, pretrained_model_name_or_path: str | Path
) -> dict[str, torch.Tensor]:
    """The weights of a fine-tune of a denoiser, by the base's own names.

    Args:
        base: the denoiser.
        pretrained_model_name_or_path: folder or hub id of a pipeline or a denoiser, or folder of
            a LoRA in diffusers' format.

    Raises:
        PipelineError: there is none, or it is no fine-tune of this base.
    """
    where, component = pretrained_model_name_or_path, Backbone.of(base).component
    try:
        if (Path(where) / LORA_WEIGHT_NAME_SAFE).is_file():
            tuned = deepcopy(base)
            tuned.load_lora_adapter(
                str(where), prefix=component, weight_name=LORA_WEIGHT_NAME_SAFE,
                use_safetensors=True,
            )  # fmt: skip
            tuned.fuse_lora()
            tuned.unload_lora()
        else:
            alone = (Path(where) / "config.json").is_file()
            subfolder = {} if alone else {"subfolder": component}
            tuned = type(base).from_pretrained(where, use_safetensors=True, **subfolder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise PipelineError(
            f"no fine-tune could be loaded from {where}: {in_brief(error)}"
        ) from error
    weights: dict[str, torch.Tensor] = tuned.state_dict()
    shapes = {k: v.shape for k, v in base.state_dict().items()}
    if differs := sorted(k for k, v in shapes.items() if k not in weights or weights[k].shape != v):
        raise PipelineError(f"{where} is no fine-tune of this base; they differ in {differs[0]}")
    return weights
