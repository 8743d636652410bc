"""Pipelines from a folder or hub id, whole and in one precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import PreTrainedModel


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
        first = str(error).strip().splitlines()[0]
        raise PipelineError(
            f"no pipeline could be loaded from {pretrained_model_name_or_path}: {first}"
        ) from error
    for part in pipe.components.values():
        # left alone, transformers loads what was saved in half precision as halves, diffusers
        # as whole numbers, and the first pass fails
        if isinstance(part, PreTrainedModel):
            part.float()
    pipe.set_progress_bar_config(disable=True)
    return pipe
