"""A denoiser made worse for one pass: what skip-layer and perturbed-attention guidance and
AutoGuidance steer away from. The changes are diffusers' own hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pilotfish.guidances import Guidance
from pilotfish.interface import GuideError


@contextmanager
def degraded(denoiser: nn.Module, guidance: Guidance, weak: Any = None) -> Iterator[Any]:
    """The denoiser whose pass a guidance steers away from, inside the block.

    It is the denoiser itself with hooks on some of its blocks, which go when the block ends; so
    no other thread may call it in the meantime.

    Args:
        weak: the denoiser of ``guidance.weak_model``, which then is the one.

    Raises:
        GuideError: the weaker model is not given, or the denoiser lacks a block that is to be
            skipped.
    """
    if guidance.weak_model is not None:
        if weak is None:
            raise GuideError(
                f"this guidance needs the weaker model {guidance.weak_model}, which is not loaded "
                "here; use a guide that was taught it with refresh=0"
            )
        yield weak
        return
    names = guidance.degraded_layers or _mid_block(denoiser)
    kept = {module for module in denoiser.modules() if hasattr(module, "_diffusers_hook")}
    try:
        _skip(denoiser, names, attention_only=guidance.guidance == "pag")
        yield denoiser
    finally:
        _lift(denoiser, kept)


def _mid_block(denoiser: nn.Module) -> tuple[str, ...]:
    """The transformer blocks of a UNet's mid block, which arXiv 2403.17377 perturbs.

    Raises:
        GuideError: it has none.
    """
    found = tuple(
        name
        for name, _ in denoiser.named_modules()
        if name.startswith("mid_block.") and name.split(".")[-2] == "transformer_blocks"
    )
    if not found:
        raise GuideError(
            f"this {type(denoiser).__name__} has no transformer block in a mid block; name the "
            "blocks to degrade with --degraded_layers, such as transformer_blocks.7"
        )
    return found


def _skip(denoiser: nn.Module, names: tuple[str, ...], attention_only: bool) -> None:
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    by_stack: dict[str, list[int]] = {}
    for name in names:
        stack, _, index = name.rpartition(".")
        if not (stack and index.isdecimal()):
            raise GuideError(f"{name} is no block of a stack, such as transformer_blocks.7")
        by_stack.setdefault(stack, []).append(int(index))
    whole = not attention_only
    for stack, indices in by_stack.items():
        config = LayerSkipConfig(
            indices, stack, skip_attention=whole, skip_attention_scores=attention_only,
            skip_ff=whole,
        )  # fmt: skip
        try:
            apply_layer_skip(denoiser, config)
        except (ValueError, KeyError) as error:
            how = "perturb the attention of" if attention_only else "skip"
            raise GuideError(
                f"diffusers cannot {how} {stack} of a {type(denoiser).__name__}: {error}"
            ) from error


def _lift(denoiser: nn.Module, kept: set[nn.Module]) -> None:
    """Take the hooks off again, and of the registries those that are new."""
    from diffusers.hooks.layer_skip import _LAYER_SKIP_HOOK

    for module in denoiser.modules():
        registry: Any = getattr(module, "_diffusers_hook", None)
        if registry is None:
            continue
        registry.remove_hook(_LAYER_SKIP_HOOK, recurse=False)
        if module not in kept:
            del module._diffusers_hook
            vars(module).pop("forward", None)  # diffusers leaves the bound method
