"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x, XL and their kin.

A guide is asked when a call begins. What it answers is added to the text on its way in, to the
mid block's output, to the skip features on their way into the decoder, to what its
modules make, the last of them the prediction; and the layers that take in the text answer
further away from the negative prompt. Residuals of a ControlNet are added beside it.

Hooks are native PyTorch hooks, and they do nothing unless a :class:`GuidedPass` is open
in the current context: a plain pipeline that shares the UNet never notices them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import TextTimeEmbedding
from torch.utils.hooks import RemovableHandle

from pilotfish.contract import GuideError, GuideInputs, GuideLike, Injection

_SHOWN = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs")
_OPEN: ContextVar[GuidedPass | None] = ContextVar("pilotfish_guided_pass", default=None)


class GuidedPass:
    """One guided use of a denoiser: the guide, its scale, its negative prompt.

    While it is open (``with guided_pass.open():``) every call of a denoiser that has hooks
    for this guide is guided. It belongs to one thread or task.

    Args:
        guide: the guide.
        guidance_scale: a function that gives w, a number or (N,); asked at every call.
        negative_hidden_states: a function that gives (1 or N, L, D).
        watch: called before every guided call.
    """

    def __init__(
        self,
        guide: GuideLike,
        guidance_scale: Callable[[], float | torch.Tensor],
        negative_hidden_states: Callable[[], torch.Tensor],
        watch: Callable[[], None] = lambda: None,
    ) -> None:
        self.guide = guide
        self.guidance_scale = guidance_scale
        self.negative_hidden_states = negative_hidden_states
        self.watch = watch
        self._injection = Injection()
        self._negative = torch.empty(0)
        self._queries: dict[str, torch.Tensor] = {}
        self._turn = self._embedding = torch.empty(0)
        self._skips: list[torch.Tensor] = []
        self._pending: list[torch.Tensor | None] = []
        self._serving: dict[int, object] = {}

    @contextmanager
    def open(self) -> Iterator[GuidedPass]:
        """Guide every denoiser call inside the block."""
        token = _OPEN.set(self)
        try:
            yield self
        finally:
            _OPEN.reset(token)
            self._forget()
            self._serving = {}

    def served_by(self, denoiser: object, hooks: object) -> bool:
        """Whether ``hooks`` serve this pass on ``denoiser``. One guide may be installed there
        several times (two pipelines that share a UNet); the first to come serves alone."""
        return self._serving.setdefault(id(denoiser), hooks) is hooks

    def begin(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """A denoiser call starts: ask the guide.

        A scale of at most 1 leaves the call alone, bit for bit.

        Returns:
            The encoder hidden states to go on with.
        """
        self._forget()
        self._injection = Injection()
        n, scale = len(sample), self.guidance_scale()
        if isinstance(scale, torch.Tensor):
            scale = scale.to(sample.device, torch.float32).expand(n)
        elif scale > 1:
            scale = torch.full((n,), float(scale), device=sample.device)
        else:
            return encoder_hidden_states
        timestep = torch.as_tensor(timestep, device=sample.device)
        self.watch()
        negative = self._negative = self.negative_hidden_states()
        self._injection = self.guide(
            GuideInputs(
                latents=sample[:, : self.guide.config.denoiser["in_channels"]],
                timestep=timestep.reshape(-1).expand(n),
                guidance_scale=scale,
                encoder_hidden_states=encoder_hidden_states,
                negative_hidden_states=negative.expand(n, *negative.shape[1:]),
                added_cond_kwargs=dict(added_cond_kwargs or {}),
            )
        )
        text = self._injection.text
        return encoder_hidden_states if text is None else encoder_hidden_states + text

    def saw(self, *features: torch.Tensor) -> None:
        """The encoder made skip features."""
        if self._injection.encoder is not None:
            self._skips.extend(features)

    def middle(self, mid: torch.Tensor) -> torch.Tensor:
        """The mid block is done: add what belongs to it, keep what belongs to the skips."""
        if self._injection.encoder is None:
            return mid
        skips, addition = self._injection.encoder(tuple(self._skips), mid)
        self._pending, self._skips = list(skips), []
        return mid if addition is None else mid + addition

    def consume(self, skips: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A decoder block takes its skip features, the newest last: add what belongs to them."""
        if not self._pending:
            return skips
        extra, self._pending = self._pending[-len(skips) :], self._pending[: -len(skips)]
        return tuple(s if e is None else s + e for s, e in zip(skips, extra, strict=True))

    def add(self, name: str, entered: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """A module is done: add what belongs to it."""
        addition = self._injection.modules.get(name)
        return made if addition is None else made + addition(entered, made)

    def asks(self, name: str, query: torch.Tensor) -> None:
        """A cross-attention layer asks, (N, pixels, width)."""
        if name in self._injection.pushes:
            self._queries[name] = query

    def push(self, name: str, layer: Any, answer: torch.Tensor) -> torch.Tensor:
        """What a cross-attention layer answers, (N, pixels, width), before its last projection:
        push it on, away from what it would have answered to the negative prompt."""
        query = self._queries.pop(name, None)
        if query is None:
            return answer

        def split(x: torch.Tensor) -> torch.Tensor:  # by heads; one negative prompt serves all
            return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2).expand(len(query), -1, -1, -1)

        other = F.scaled_dot_product_attention(
            split(query), split(layer.to_k(self._negative)), split(layer.to_v(self._negative)),
            scale=layer.scale,
        ).transpose(1, 2)  # fmt: skip
        gain = self._injection.pushes[name][:, None, :, None]
        away = gain * (answer.unflatten(-1, (layer.heads, -1)) - other)
        return answer + away.flatten(2)

    def pools(self, pooling: Any, made: torch.Tensor) -> None:
        """The denoiser pooled the text for its embedding, (N, E): keep the way from there to
        the pooled negative prompt."""
        if self._injection.pushes:
            self._turn = pooling.forward(self._negative) - made

    def embeds(self, embedding: torch.Tensor) -> None:
        """A residual layer is given the embedding of timestep and text, (N, E)."""
        self._embedding = embedding

    def push_embedding(self, name: str, layer: Any, answer: torch.Tensor) -> torch.Tensor:
        """What a residual layer takes from the embedding, (N, channels): push it on, away from
        what it would take with the negative prompt."""
        gain = self._injection.pushes.get(name)
        if gain is None:
            return answer
        other = layer.time_emb_proj.forward(layer.nonlinearity(self._embedding + self._turn))
        return answer + gain * (answer - other)

    def _forget(self) -> None:
        # the injection stays: gradient checkpointing runs the decoder once more in the
        # backward pass, when the pass is closed
        self._skips, self._pending, self._queries = [], [], {}


class Hooks:
    """The hooks of one guide on one denoiser; :meth:`remove` leaves no trace."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self.handles = handles

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def install(guide: GuideLike, unet: UNet2DConditionModel) -> Hooks:
    """Put a guide's hooks on a UNet, for training and for inference alike.

    Raises:
        GuideError: the UNet lacks a module that the guide touches.
    """
    hooks = Hooks([])

    def current() -> GuidedPass | None:
        guided = _OPEN.get()
        if guided is None or guided.guide is not guide or not guided.served_by(unet, hooks):
            return None
        return guided

    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guided = current()
        if not guided:
            return None
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False))
        named |= {k: kwargs[k] for k in _SHOWN if k in kwargs}
        text = guided.begin(**named)
        if len(args) > 2:
            return (*args[:2], text, *args[3:]), kwargs
        return args, {**kwargs, "encoder_hidden_states": text}

    def first(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if guided := current():
            guided.saw(output)

    def down(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if guided := current():
            guided.saw(*output[1])

    def middle(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        guided = current()
        return guided.middle(output) if guided else None

    def up(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guided = current()
        if not guided:
            return None
        name = "res_hidden_states_tuple"
        return args, {**kwargs, name: guided.consume(kwargs[name])}

    def touched(name: str) -> Callable[..., Any]:
        def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            guided = current()
            if not guided:
                return None
            if isinstance(output, tuple):  # a transformer asked for no dict
                return guided.add(name, args[0], output[0]), *output[1:]
            if isinstance(output, torch.Tensor):
                return guided.add(name, args[0], output)
            output.sample = guided.add(name, args[0], output.sample)
            return output

        return after

    def asked(name: str) -> Callable[..., None]:
        def after(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            if guided := current():
                guided.asks(name, output)

        return after

    def answered(name: str, layer: Any) -> Callable[..., Any]:
        def before(module: Any, args: tuple[Any, ...]) -> Any:
            guided = current()
            return (guided.push(name, layer, args[0]), *args[1:]) if guided else None

        return before

    def pooled(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if guided := current():
            guided.pools(module, output)

    def embeds(module: Any, args: tuple[Any, ...]) -> None:
        if guided := current():
            guided.embeds(args[1])

    def embedded(name: str, layer: Any) -> Callable[..., Any]:
        def after(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> Any:
            guided = current()
            return guided.push_embedding(name, layer, output) if guided else None

        return after

    def pushed(name: str) -> list[RemovableHandle]:
        layer = modules[name]
        if hasattr(layer, "to_q"):  # cross-attention
            return [
                layer.to_q.register_forward_hook(asked(name)),
                layer.to_out[0].register_forward_pre_hook(answered(name, layer)),
            ]
        return [
            layer.register_forward_pre_hook(embeds),
            layer.time_emb_proj.register_forward_hook(embedded(name, layer)),
        ]

    modules: dict[str, Any] = dict(unet.named_modules())
    if unknown := [name for name in (*guide.touches, *guide.pushes) if name not in modules]:
        raise GuideError(f"this denoiser has no {unknown[0]}, to which the guide adds")
    hooks.handles = [
        unet.register_forward_pre_hook(begin, with_kwargs=True),
        unet.conv_in.register_forward_hook(first),
        *(block.register_forward_hook(down) for block in unet.down_blocks),
        unet.mid_block.register_forward_hook(middle),
        *(block.register_forward_pre_hook(up, with_kwargs=True) for block in unet.up_blocks),
        *(modules[name].register_forward_hook(touched(name)) for name in guide.touches),
        *(handle for name in guide.pushes for handle in pushed(name)),
    ]
    pooling = getattr(unet, "add_embedding", None)
    if guide.pushes and isinstance(pooling, TextTimeEmbedding):
        hooks.handles.append(pooling.register_forward_hook(pooled))
    return hooks
