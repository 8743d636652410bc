"""Integers on devices without contents.

Some denoisers read numbers out of tensors on the way, such as the lengths of the prompts. On the
meta device, and of fake tensors, there are none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

LARGEST = 2**20
"""Elements of a tensor whose contents are kept."""
BY_SHAPE = (torch.ops.aten.ones_like, torch.ops.aten.zeros_like, torch.ops.aten.full_like)
"""Operators that take nothing but the shape from a tensor."""


class KnownIntegers(TorchDispatchMode):
    """Keeps the contents of small integer and boolean tensors that have none by themselves, while
    it is active. It enters after ``FakeTensorMode``, where that is used."""

    def __init__(self) -> None:
        super().__init__()
        self.contents = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket
        with _disable_current_modes():
            if name is torch.ops.aten._local_scalar_dense and args[0] in self.contents:
                return self.contents[args[0]].item()
            if name is torch.ops.aten._to_copy and self._to_cpu(args[0], kwargs):
                return self.contents[args[0]].clone()
        output = func(*args, **kwargs)
        made = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        if any(_kept(x) for x in made):
            self._follow(func, args, kwargs, made)
        return output

    def _to_cpu(self, tensor: torch.Tensor, kwargs: Any) -> bool:
        to_cpu = torch.device(kwargs.get("device") or "meta").type == "cpu"
        return to_cpu and tensor.device.type == "meta" and tensor in self.contents

    def _follow(self, func: Any, args: Any, kwargs: Any, made: list[torch.Tensor]) -> None:
        """Do the same with the contents, where all are known."""
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        by_shape = func.overloadpacket in BY_SHAPE
        if not by_shape and any(_contentless(x) and x not in self.contents for x in inputs):
            return

        def known(x: Any) -> Any:
            if isinstance(x, torch.Tensor):
                return torch.empty(x.shape, dtype=x.dtype) if by_shape else self.contents.get(x, x)
            return torch.device("cpu") if isinstance(x, torch.device) else x

        with _disable_current_modes():
            real = tree_leaves(func(*tree_map(known, args), **tree_map(known, kwargs)))
        real = [x for x in real if isinstance(x, torch.Tensor)]
        for tensor, contents in zip(made, real, strict=True):
            if _kept(tensor):
                self.contents[tensor] = contents


def _contentless(x: torch.Tensor) -> bool:
    return x.device.type == "meta" or isinstance(x, FakeTensor)


def _kept(x: torch.Tensor) -> bool:
    integers = not (x.is_floating_point() or x.is_complex())
    return integers and _contentless(x) and x.numel() <= LARGEST
