"""A denoiser made worse for one pass: what skip-layer and perturbed-attention guidance and
AutoGuidance steer away from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from typing import Any

from torch import nn

from pilotfish.guidances import Guidance
from pilotfish.interface import GuideError


@contextmanager
def degraded(denoiser: nn.Module, guidance: Guidance, weak: Any = None) -> Iterator[Any]:
    """The denoiser whose pass a guidance steers away from, inside the block.

    It is the denoiser itself with some of its blocks changed, which end with this block; so no
    other thread may call it in the meantime.

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
    blocks = _blocks(denoiser, guidance.degraded_layers or _mid_block(denoiser))
    perturb = guidance.guidance == "pag"
    with ExitStack() as stack:
        try:
            stack.enter_context(_perturbed(denoiser, blocks) if perturb else _skipped(blocks))
        except ValueError as error:
            how = "perturb the attention of" if perturb else "skip"
            raise GuideError(
                f"diffusers cannot {how} {', '.join(blocks)} of a {type(denoiser).__name__}: "
                f"{error}"
            ) from error
        yield denoiser


def _blocks(denoiser: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The transformer blocks of some names.

    Raises:
        GuideError: there is none of such a name in a list of modules.
    """
    modules = dict(denoiser.named_modules())
    for name in names:
        stack = modules.get(name.rpartition(".")[0])
        if name not in modules or not isinstance(stack, nn.ModuleList):
            raise GuideError(
                f"{type(denoiser).__name__} has no block {name}; --degraded_layers takes names "
                "such as transformer_blocks.7"
            )
    return {name: modules[name] for name in names}


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


@contextmanager
def _perturbed(denoiser: nn.Module, blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Self-attention reads the pixel itself alone, by diffusers' hooks, which are taken off."""
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip
    from diffusers.hooks.layer_skip import _LAYER_SKIP_HOOK

    kept = {module for module in denoiser.modules() if hasattr(module, "_diffusers_hook")}
    try:
        for name in blocks:
            stack, _, index = name.rpartition(".")
            apply_layer_skip(
                denoiser,
                LayerSkipConfig(
                    [int(index)], stack, skip_attention=False, skip_attention_scores=True,
                    skip_ff=False,
                ),
            )  # fmt: skip
        yield
    finally:
        for module in denoiser.modules():
            registry: Any = getattr(module, "_diffusers_hook", None)
            if registry is None:
                continue
            registry.remove_hook(_LAYER_SKIP_HOOK, recurse=False)
            if module not in kept:
                del module._diffusers_hook
                vars(module).pop("forward", None)  # diffusers leaves the bound method


@contextmanager
def _skipped(blocks: Mapping[str, nn.Module]) -> Iterator[None]:
    """Blocks return what they are given. Diffusers' own hook, as of 0.42, returns the two streams
    of SD3 and Qwen-Image in the wrong order and does not know Z-Image's arguments."""
    own = {block: vars(block).get("forward") for block in blocks.values()}
    functions = {block: _identity(block) for block in own}
    try:
        for block, function in functions.items():
            block.forward = function
        yield
    finally:
        for block, forward in own.items():
            vars(block).pop("forward", None)
            if forward is not None:
                block.forward = forward


def _identity(block: nn.Module) -> Callable[..., Any]:
    """A forward of a transformer block that returns its arguments as the block would.

    Raises:
        ValueError: diffusers does not know the block.
    """
    from diffusers.hooks._helpers import TransformerBlockRegistry

    known: Any = TransformerBlockRegistry.get(type(block))
    names = list(signature(block.forward).parameters)
    image, text = (
        getattr(known, f"{name}_argument_name", name)
        for name in ("hidden_states", "encoder_hidden_states")
    )
    image = image if image in names else names[0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        if known.return_encoder_hidden_states_index is None:
            return given[image]
        pair = given[image], given[text]
        return pair if known.return_hidden_states_index == 0 else pair[::-1]

    return forward
