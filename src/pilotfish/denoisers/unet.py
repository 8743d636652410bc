"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x, XL and their kin.

A guide is asked when a call begins. What it answers is added to the text on its way in, to the
mid block's output, to the skip features on their way into the decoder, to what its
modules make, the last of them the prediction; and cross-attention layers answer further away
from the negative prompt. Residuals of a ControlNet are added beside it.

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
from torch.utils.hooks import RemovableHandle

from pilotfish.contract import GuideError, GuideInputs, GuideLike, Injection

_SHOWN = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs")
_OPEN: ContextVar[GuidedPass | None] = ContextVar("pilotfish_guided_pass", default=None)


def fingerprint(unet: UNet2DConditionModel, prediction_type: str) -> dict[str, Any]:
    """What must agree for a guide to fit: the shape of the denoiser and what it predicts."""
    config = unet.config
    return {
        "family": type(unet).__name__,
        "in_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": list(config.down_block_types),
        "mid_block_type": config.mid_block_type,
        "up_block_types": list(config.up_block_types),
        "transformer_layers_per_block": config.transformer_layers_per_block,
        "attention_head_dim": config.attention_head_dim,
        "use_linear_projection": config.use_linear_projection,
        "cross_attention_dim": config.cross_attention_dim,
        "prediction_type": prediction_type,
    }


def skip_channels(config: Any) -> list[int]:
    """Channels of the skip features in the order in which the encoder makes them.

    ``config`` is a UNet's configuration or a fingerprint.
    """
    config = dict(config)
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    layers = [layers] * len(widths) if isinstance(layers, int) else layers
    channels = [widths[0]]
    for i, (width, depth) in enumerate(zip(widths, layers, strict=True)):
        last = i == len(widths) - 1
        channels += [width] * (depth if last else depth + 1)
    return channels


def skip_levels(config: Any) -> list[int]:
    """The resolution level of each skip feature: 0 is the latents' own, each next one half."""
    config = dict(config)
    count, layers = len(config["block_out_channels"]), config["layers_per_block"]
    layers = [layers] * count if isinstance(layers, int) else layers
    levels = [0]
    for i, depth in enumerate(layers):
        levels += [i] * depth + ([i + 1] if i < count - 1 else [])
    return levels


def decoder_layers(config: Any) -> dict[str, int]:
    """The decoder's residual and attention layers in the order in which they run: the name of
    each module, and the channels that it makes.

    ``config`` is a UNet's configuration or a fingerprint.
    """
    config = dict(config)
    widths, depths = config["block_out_channels"], config["layers_per_block"]
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    blocks = zip(reversed(widths), reversed(depths), config["up_block_types"], strict=True)
    layers: dict[str, int] = {}
    for i, (width, depth, kind) in enumerate(blocks):
        for j in range(depth + 1):
            layers[f"up_blocks.{i}.resnets.{j}"] = width
            if "CrossAttn" in kind:
                layers[f"up_blocks.{i}.attentions.{j}"] = width
    return layers


def cross_attention_layers(config: Any) -> dict[str, int]:
    """The cross-attention layers of mid block and decoder in the order in which they run: the
    name of each, and its heads.

    ``config`` is a UNet's configuration or a fingerprint.
    """
    config = dict(config)
    blocks = len(config["block_out_channels"])

    def each(value: Any) -> list[Any]:
        return list(value) if isinstance(value, list | tuple) else [value] * blocks

    # diffusers' own naming: what is called the dimension of a head is their number
    heads = each(config["attention_head_dim"])
    depths = each(config["layers_per_block"])
    inner = each(config["transformer_layers_per_block"])
    layers: dict[str, int] = {}

    def add(place: str, level: int) -> None:
        count = inner[level]
        for k in range(count if isinstance(count, int) else count[0]):
            layers[f"{place}.transformer_blocks.{k}.attn2"] = heads[level]

    if "CrossAttn" in (config["mid_block_type"] or ""):
        add("mid_block.attentions.0", blocks - 1)
    for i, kind in enumerate(config["up_block_types"]):
        if "CrossAttn" in kind:
            for j in range(depths[blocks - 1 - i] + 1):
                add(f"up_blocks.{i}.attentions.{j}", blocks - 1 - i)
    return layers


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
        if name in self._injection.attention:
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
        gain = self._injection.attention[name][:, None, :, None]
        away = gain * (answer.unflatten(-1, (layer.heads, -1)) - other)
        return answer + away.flatten(2)

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
        *(modules[name].to_q.register_forward_hook(asked(name)) for name in guide.pushes),
        *(
            modules[name].to_out[0].register_forward_pre_hook(answered(name, modules[name]))
            for name in guide.pushes
        ),
    ]
    return hooks
