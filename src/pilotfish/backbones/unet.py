"""UNet2DConditionModel: Stable Diffusion 1.x, 2.x, XL and their kin.

A guide is asked when a call begins. What it answers is added to the text on its way in, to the
mid block's output, to the skip features on their way into the decoder, to what its
modules make, the last of them the prediction; and the layers that take in the text answer
further away from the negative prompt. Residuals of a ControlNet are added beside it.

Hooks are native PyTorch hooks, and they do nothing unless a :class:`GuidedPass` is open
in the current thread: a plain pipeline that shares the UNet never notices them.

``torch.compile`` makes one graph of a guided denoiser, as of a plain one. What is asked once a
call, before and after it, stays outside: the scale, the prompts and the guide's answer to them
differ from call to call, and the graph takes that answer in as tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.hooks import RemovableHandle

from pilotfish.backbones.guided_pass import GuidedPass
from pilotfish.backbones.layout import TEXTS_EMBEDDED
from pilotfish.interface import GuideError, GuideLike

_SHOWN = ("sample", "timestep", "encoder_hidden_states", "added_cond_kwargs")


class Hooks:
    """The hooks of one guide on one denoiser; :meth:`remove` leaves no trace."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.modules: dict[str, Any] = dict(unet.named_modules())
        self.handles: list[RemovableHandle] = []

    def sit_on(self, unet: UNet2DConditionModel) -> bool:
        """Whether they are on this denoiser, and its modules those of then: loading a LoRA puts
        others in the place of some."""
        return self.modules == dict(unet.named_modules())

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def install(guide: GuideLike, unet: UNet2DConditionModel) -> Hooks:
    """Put a guide's hooks on a UNet, for training and for inference alike.

    Raises:
        GuideError: the UNet lacks a module that the guide touches, or has one that it cannot push.
    """
    hooks = Hooks(unet)
    modules = hooks.modules

    own = {id(module) for module in modules.values()}

    def current(module: Any) -> GuidedPass | None:
        guided = GuidedPass.current()
        if guided is None or guided.guide is not guide or not guided.served_by(hooks):
            return None
        return guided if id(module) in own else None  # a copy of a module has copies of its hooks

    @torch.compiler.disable
    def begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guided = current(module)
        if not guided:
            return None
        named = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False))
        named |= {k: kwargs[k] for k in _SHOWN if k in kwargs}
        text = guided.begin(**named)
        if len(args) > 2:
            return (*args[:2], text, *args[3:]), kwargs
        return args, {**kwargs, "encoder_hidden_states": text}

    @torch.compiler.disable
    def end(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if guided := current(module):
            guided.end(output[0])

    def first(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if guided := current(module):
            guided.saw(output)

    def down(module: Any, args: tuple[Any, ...], output: Any) -> None:
        if guided := current(module):
            guided.saw(*output[1])

    def middle(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        guided = current(module)
        return guided.middle(output) if guided else None

    def up(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        guided = current(module)
        if not guided:
            return None
        name = "res_hidden_states_tuple"
        return args, {**kwargs, name: guided.consume(kwargs[name])}

    def touched(name: str) -> Callable[..., Any]:
        def after(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            guided = current(module)
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
            if guided := current(module):
                guided.asks(name, output)

        return after

    def answered(name: str, layer: Any) -> Callable[..., Any]:
        def before(module: Any, args: tuple[Any, ...]) -> Any:
            guided = current(module)
            return (guided.push(name, layer, args[0]), *args[1:]) if guided else None

        return before

    def pooled(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if guided := current(module):
            guided.pools(module, args[0], output)

    def embeds(module: Any, args: tuple[Any, ...]) -> None:
        if guided := current(module):
            guided.embeds(args[1])

    def embedded(name: str, layer: Any) -> Callable[..., Any]:
        def after(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> Any:
            guided = current(module)
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

    if unknown := [name for name in (*guide.touches, *guide.pushes) if name not in modules]:
        raise GuideError(f"this denoiser has no {unknown[0]}, to which the guide adds")
    for name in guide.pushes:
        if hasattr(getattr(modules[name], "processor", None), "to_k_custom_diffusion"):
            raise GuideError(
                f"{name} has keys and values of Custom Diffusion's own, which a guide cannot push; "
                "use the pipeline without one"
            )
    hooks.handles = [
        unet.register_forward_pre_hook(begin, with_kwargs=True),
        unet.register_forward_hook(end),
        unet.conv_in.register_forward_hook(first),
        *(block.register_forward_hook(down) for block in unet.down_blocks),
        unet.mid_block.register_forward_hook(middle),
        *(block.register_forward_pre_hook(up, with_kwargs=True) for block in unet.up_blocks),
        *(modules[name].register_forward_hook(touched(name)) for name in guide.touches),
        *(handle for name in guide.pushes for handle in pushed(name)),
    ]
    if guide.pushes and unet.config.addition_embed_type in TEXTS_EMBEDDED:
        hooks.handles.append(unet.add_embedding.register_forward_hook(pooled))
    return hooks
