"""torch.compile: a compiled denoiser has to notice the hooks of a guide."""

from __future__ import annotations

from typing import Any

import torch


def uncompiled(denoiser: Any) -> Any:
    """The denoiser itself, where ``torch.compile`` has wrapped it."""
    return getattr(denoiser, "_orig_mod", denoiser)


def is_compiled(denoiser: Any) -> bool:
    """Whether a denoiser, or any part of it, is compiled."""
    plain = uncompiled(denoiser)
    return plain is not denoiser or any(
        module._compiled_call_impl is not None for module in plain.modules()
    )


_RESET: list[bool] = []
"""Whether what was compiled without regard to hooks has been thrown away."""


def watch_hooks(layers: int = 0) -> None:
    """Compile with regard to hooks from now on, where ``layers`` have hooks of their own.

    By default ``torch.compile`` takes two modules of one class for the same code, even if only
    one of them has hooks, and so leaves out some of a guide. The first call throws away all that
    the process has compiled so far, the user's own functions included: they are compiled again
    when they are next called.
    """
    config = torch._dynamo.config
    if config.skip_nnmodule_hook_guards:  # as each thread finds it
        config.skip_nnmodule_hook_guards = False
        if not _RESET:
            torch.compiler.reset()
            _RESET.append(True)
    # where blocks are compiled one by one, those of one class are graphs of one piece of code, for
    # every size of batch or image again
    for name in ("cache_size_limit", "accumulated_cache_size_limit"):  # as older torch has them too
        setattr(config, name, max(getattr(config, name), 8 * (layers + 16)))
