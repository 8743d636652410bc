"""Layers that take in the text answer further away from the negative prompt.

``a + g (a - a_n)``: the answer ``a_n`` to that prompt takes keys and values, or a pooled text,
that are the same at every step. They are made once for a call of the pipeline, where nothing can
change them on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pilotfish.interface import TextConditions

T = TypeVar("T")


class Pushing:
    """The pushes of one guided use of a denoiser, which makes one call of it after another."""

    def __init__(self) -> None:
        self.gains: Mapping[str, torch.Tensor] = {}
        self.negative = TextConditions(torch.empty(0))
        self._kept: dict[nn.Module, Any] = {}
        self._queries: dict[str, torch.Tensor] = {}
        self._turn = torch.empty(0)
        self._turned: torch.Tensor | None = None

    def begin(self, gains: Mapping[str, torch.Tensor], negative: TextConditions) -> None:
        """A denoiser call starts.

        Args:
            gains: g by the name of the layer; see :class:`pilotfish.interface.GuideOutput`.
            negative: the negative prompts of the batch, or one that serves all.
        """
        if negative is not self.negative:
            self._kept = {}
        self.gains, self.negative, self._turned, self._queries = gains, negative, None, {}

    def forget(self) -> None:
        """The last of them is over. The gains stay: gradient checkpointing asks once more."""
        self._kept, self._queries = {}, {}

    def asks(self, name: str, query: torch.Tensor) -> None:
        """A cross-attention layer asks, (N, pixels, width)."""
        if name in self.gains:
            self._queries[name] = query

    def attention(self, name: str, layer: Any, answer: torch.Tensor) -> torch.Tensor | None:
        """What a cross-attention layer answers, (N, pixels, width), before its last projection:
        the same, pushed on. None: this layer is not pushed."""
        query = self._queries.pop(name, None)
        if query is None:
            return None

        def split(x: torch.Tensor) -> torch.Tensor:  # by heads
            return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2)

        def keys_and_values() -> tuple[torch.Tensor, torch.Tensor]:
            negative = self.negative.hidden_states
            return split(layer.to_k(negative)), split(layer.to_v(negative))

        key, value = self._keep(layer, (layer.to_k, layer.to_v), keys_and_values)
        n = len(query)  # one negative prompt serves all
        other = F.scaled_dot_product_attention(
            split(query), key.expand(n, -1, -1, -1), value.expand(n, -1, -1, -1), scale=layer.scale
        ).transpose(1, 2)
        gain = self.gains[name][:, None, :, None]
        return _pushed(answer.unflatten(-1, (layer.heads, -1)), other, gain).flatten(2)

    def pools(self, pooling: Any, given: torch.Tensor, made: torch.Tensor) -> None:
        """The denoiser made (N, E) of what it was ``given`` for its embedding: the hidden states
        of the text, which it pools, or SDXL's pooled text with the sizes after it. Keep the way
        from there to what it would have made of the negative prompt."""
        if not self.gains:
            return
        pooled = self.negative.pooled
        if pooled is None:
            within = [module for part in pooling.children() for module in part.modules()]
            other = self._keep(
                pooling, within, lambda: pooling.forward(self.negative.hidden_states)
            )
        else:
            sizes = given[:, pooled.shape[1] :]
            pooled = pooled.to(given).expand(len(given), -1)  # the pipeline turns the prompt's so
            other = pooling.forward(torch.cat([pooled, sizes], 1))
        self._turn = other - made

    def embeds(self, embedding: torch.Tensor) -> None:
        """A residual layer is given the embedding of timestep and text, (N, E)."""
        if self.gains and self._turned is None:  # all are given the same
            self._turned = embedding + self._turn

    def embedding(self, name: str, layer: Any, answer: torch.Tensor) -> torch.Tensor | None:
        """What a residual layer takes from the embedding, (N, channels): the same, pushed on.
        None: this layer is not pushed."""
        gain = self.gains.get(name)
        if gain is None:
            return None
        other = layer.time_emb_proj.forward(layer.nonlinearity(self._turned))
        return _pushed(answer, other, gain)

    def _keep(self, owner: nn.Module, parts: Iterable[nn.Module], make: Callable[[], T]) -> T:
        """What parts of a module make of the negative prompt, made once where it is sure to stay.

        It is not while anything learns, nor where an adapter may be turned up or down between
        two steps, nor where a part was patched. A compiled graph makes it anew: one that took it
        in from outside would have to be another graph than the first, which makes it."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return make()
        if any(isinstance(part, BaseTunerLayer) or _patched(part) for part in parts):
            return make()
        if owner not in self._kept:
            self._kept[owner] = make()
        kept: T = self._kept[owner]
        return kept


def _patched(module: nn.Module) -> bool:
    """Whether it has hooks, or another ``forward`` than that of its class."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _pushed(answer: torch.Tensor, other: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """``answer + gain (answer - other)``, in few goes through memory."""
    return torch.addcmul(answer, gain, answer - other)
