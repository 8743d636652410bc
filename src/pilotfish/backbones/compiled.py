"""torch.compile: a compiled denoiser has to notice the hooks of a guide."""

from __future__ import annotations

from typing import Any

import torch


def uncompiled(unet: Any) -> Any:
    """The denoiser itself, where ``torch.compile`` has wrapped it."""
    return getattr(unet, "_orig_mod", unet)


def is_compiled(unet: Any) -> bool:
    """Whether a denoiser, or any part of it, is compiled."""
    parts = uncompiled(unet).modules()
    return uncompiled(unet) is not unet or any(m._compiled_call_impl is not None for m in parts)


_HEEDED: list[bool] = []
"""Whether what was compiled without regard to hooks has been thrown away."""


def heed_hooks(layers: int = 0) -> None:
    """Compile with regard to hooks, from now on, where ``layers`` have hooks of their own.

    By default ``torch.compile`` takes two modules of one class for the same code, even if only
    one of them has hooks, and so leaves out some of a guide.
    """
    config = torch._dynamo.config
    if config.skip_nnmodule_hook_guards:  # as each thread finds it
        config.skip_nnmodule_hook_guards = False
        if not _HEEDED:
            torch.compiler.reset()
            _HEEDED.append(True)
    # where blocks are compiled one by one, those of one class are graphs of one piece of code, for
    # every size of batch or picture again
    for name in ("cache_size_limit", "accumulated_cache_size_limit"):  # as older torch has them too
        setattr(config, name, max(getattr(config, name), 8 * (layers + 16)))
