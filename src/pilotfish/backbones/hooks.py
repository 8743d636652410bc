"""Hooks of a guide on a denoiser: native PyTorch hooks that do nothing outside a guided pass.

A plain pipeline that shares the denoiser never notices them, and :meth:`Hooks.remove` leaves no
trace. A copied or pickled denoiser takes none of them along.

``torch.compile`` makes one graph of a guided denoiser, as of a plain one. What happens once a
call, before and after it, stays outside the graph: scale, prompts and the guide's output differ
from call to call, and the graph takes that output in as tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pilotfish.backbones.context import GuidedPass
from pilotfish.interface import GuideProtocol


class Hooks:
    """The hooks of one guide on one denoiser.

    Attributes:
        modules: the denoiser's modules by name, as they were when the hooks were placed.
    """

    def __init__(self, guide: GuideProtocol, denoiser: nn.Module) -> None:
        self.guide = guide
        self.modules: dict[str, Any] = dict(denoiser.named_modules())
        for module in self.modules.values():
            _drop_copied(module)
        self.handles: list[RemovableHandle] = []
        self._restores: list[Callable[[], None]] = []
        self._first, self._others = self, list[Hooks]()

    def join(self, other: Hooks) -> None:
        """Serve one guided pass together with hooks on another denoiser of the same pipeline."""
        other._first = self
        self._others.append(other)

    def fit(self, *denoisers: nn.Module) -> bool:
        """Whether they are on these denoisers and their modules are still the same: loading a LoRA
        replaces some."""
        placed = [hooks.modules for hooks in (self, *self._others)]
        return placed == [dict(denoiser.named_modules()) for denoiser in denoisers]

    def current(self) -> GuidedPass | None:
        """The active guided pass of this thread, where these hooks serve it."""
        guided = GuidedPass.current()
        if guided is None or guided.guide is not self.guide:
            return None
        return guided if guided.hooks is None or guided.hooks is self._first else None

    def before(
        self, module: nn.Module, function: Callable[..., Any], doubled: bool = False
    ) -> None:  # fmt: skip
        """``function(guided, module, args, kwargs)`` before a module; it returns ``args, kwargs``,
        or None to leave them as they are.

        Args:
            doubled: call it in denoiser calls with both passes, too.
        """
        hook = _Hook(self, function, opens=doubled)
        self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(
        self, module: nn.Module, function: Callable[..., Any], doubled: bool = False
    ) -> None:  # fmt: skip
        """``function(guided, module, args, output)`` after a module; it returns the output, or
        None to leave it as it is.

        Args:
            doubled: call it in denoiser calls with both passes, too.
        """
        self.handles.append(module.register_forward_hook(_Hook(self, function, opens=doubled)))

    def keep(
        self, module: nn.Module, key: Any, change: Callable[[Any], Any] = lambda output: output
    ) -> None:
        """Keep what ``change`` makes of a module's output as ``scratch[key]`` of the pass."""

        def after(guided: GuidedPass, module: Any, args: Any, output: Any) -> None:
            guided.scratch[key] = change(output)

        self.after(module, after)

    def around(
        self, denoiser: nn.Module, begin: Callable[..., Any], end: Callable[..., Any]
    ) -> None:
        """``begin`` before and ``end`` after every call of the denoiser, outside of any graph."""
        opens = _OutsideHook(self, begin, opens=True)
        self.handles += [
            denoiser.register_forward_pre_hook(opens, with_kwargs=True),
            denoiser.register_forward_hook(_OutsideHook(self, end, opens=True)),
        ]

    def before_graph(self, denoiser: nn.Module, function: Callable[..., None]) -> None:
        """``function(guided)`` before every guided call of the denoiser, after the guide has run
        and outside of any graph."""

        def prepare(guided: GuidedPass, *given: Any) -> None:
            function(guided)

        hook = _OutsideHook(self, prepare)
        self.handles.append(denoiser.register_forward_pre_hook(hook, with_kwargs=True))

    def on_removal(self, restore: Callable[[], None]) -> None:
        """Call a function at :meth:`remove`, to undo what else was done to the denoiser."""
        self._restores.append(restore)

    def remove(self) -> None:
        """Take every hook off, also those that have joined."""
        for hooks in (self, *self._others):
            for handle in hooks.handles:
                handle.remove()
            for restore in hooks._restores:
                restore()
            hooks.handles, hooks._restores = [], []


class _Hook:
    """A function of the active guided pass as a PyTorch hook."""

    of_guide = True

    def __init__(self, hooks: Hooks, function: Callable[..., Any], opens: bool = False) -> None:
        self.hooks, self.function, self.opens = hooks, function, opens

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        guided = self.hooks.current()
        if guided is None or not (guided.active or self.opens):
            return None
        return self.function(guided, module, *given)

    def __reduce__(self) -> Any:
        return _no_hook, ()


class _OutsideHook(_Hook):
    """A hook that is never part of a compiled graph."""

    __call__ = torch.compiler.disable(_Hook.__call__)


def _drop_copied(module: nn.Module) -> None:
    """Take off what a copied or unpickled module has in place of a guide's hooks, which would be
    taken for hooks of others."""
    for hooks, flags in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key in [key for key, hook in hooks.items() if hook is _nothing]:
            del hooks[key]
            flags.pop(key, None)


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of a hook in a copy of the denoiser."""


def first_output(output: Any) -> torch.Tensor:
    """The tensor of a module's output: the tensor, the first of a tuple, or ``sample``."""
    if isinstance(output, torch.Tensor):
        return output
    made: torch.Tensor = output[0]
    return made


def with_first(output: Any, tensor: torch.Tensor) -> Any:
    """A module's output with another tensor in the place of :func:`first_output`."""
    if isinstance(output, torch.Tensor):
        return tensor
    if isinstance(output, tuple):
        return tensor, *output[1:]
    output.sample = tensor
    return output


def with_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...],
    changed: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """The arguments of a call with some changed, each where it was given.

    Args:
        names: of the positional parameters.
    """
    places = {name: i for i, name in enumerate(names[: len(args)])}
    positional = list(args)
    for name, value in changed.items():
        if name in places:
            positional[places[name]] = value
        else:
            kwargs = {**kwargs, name: value}
    return tuple(positional), kwargs
