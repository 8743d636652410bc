"""ZImageTransformer2DModel: Z-Image.

Image and text are one sequence of tokens, the image first, each padded to a multiple of 32 with a
learned token that is attended to. The denoiser takes and gives lists, one tensor for each image. It
predicts the negative of the flow's velocity at the time 1 - sigma. The pipeline's guidance scale g
is w - 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ZImageTransformer2DModel
from torch.nn.utils.rnn import pad_sequence

from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joined_transformer import (
    JoinedTransformerBackbone,
    NegativeStream,
    NegativeText,
    over_rows,
)
from pilotfish.backbones.joint_attention import text_heads
from pilotfish.interface import TextConditions

MULTIPLE = 32
"""The length of each part of the sequence is a multiple of it."""


class ZImageDiTBackbone(JoinedTransformerBackbone):
    """See the module."""

    family = "z-image-dit"
    denoisers = (ZImageTransformer2DModel,)
    parameters = ("x", "t", "cap_feats")
    sign = -1
    takes_sigma = True
    stacks = ("layers",)
    attention_layer = "attention"
    text_layer = "cap_embedder.1"
    scale_offset = 1.0
    text_is_projected = True
    text_first = False
    embedders = ("cap_embedder", "context_refiner", "t_embedder")

    @property
    def patch(self) -> int:
        return int(self.denoiser.all_patch_size[0])

    @property
    def last_layer(self) -> str:
        return f"all_final_layer.{self.patch}-{self.denoiser.all_f_patch_size[0]}.linear"

    # -- hooks ------------------------------------------------------------------------------

    def place_text(self, hooks: Hooks, stream: NegativeStream) -> None:
        net = self.denoiser

        def embedded(
            guided: GuidedPass, module: Any, args: Any, output: torch.Tensor
        ) -> torch.Tensor:
            """The prompts' tokens, those of all samples in a row, are embedded: begin the negative
            prompts' stream, and extrapolate them."""
            assert guided.call is not None
            stream.begin(guided)
            given, text = guided.negative, guided.call.text
            lengths = [padded(count) for count in _counts(text)]
            rows = pad_sequence(list(output.split(lengths)), batch_first=True)
            counts = F.pad(_mask(text), (0, rows.shape[1] - text.embeds.shape[1]))
            negative = TextConditions(self.embedded_negative(guided), mask=_mask(given))
            made = guided.extrapolated_text(rows, negative, mask=counts)
            return torch.cat([row[:length] for row, length in zip(made, lengths, strict=True)])

        hooks.keep(net.t_embedder, "embedding")
        hooks.after(net.cap_embedder, embedded)

    def embed_negative(self, guided: GuidedPass) -> torch.Tensor:
        embedder = self.denoiser.cap_embedder
        return guided.cache.made_by(
            embedder, lambda: embedder.forward(guided.negative.embeds), [embedder, *embedder]
        )

    def negative_text(self, guided: GuidedPass) -> NegativeText:
        net = self.denoiser
        return guided.cache.made_by(
            net.context_refiner, lambda: self._refined(guided, self.embedded_negative(guided)),
            [net.cap_embedder, *net.cap_embedder, *net.context_refiner.modules()],
        )  # fmt: skip

    def _refined(self, guided: GuidedPass, embeds: torch.Tensor) -> NegativeText:
        """The negative prompts as they enter the first block, of their embeddings (N, L, d)."""
        assert guided.call is not None
        net, device = self.denoiser, embeds.device
        height, width = guided.call.latents.shape[-2:]
        parts, places, pads, images = [], [], [], []
        for row, count in zip(embeds, _counts(guided.negative), strict=True):
            length = padded(count)
            part, place, pad, _, _ = net._pad_with_ids(
                row[:count], (length, 1, 1), (1, 0, 0), device
            )
            parts.append(part)
            places.append(place)
            pads.append(pad)
            pixels = row.new_zeros(height * width, 1)
            _, image, *_ = net._pad_with_ids(pixels, (1, height, width), (length + 1, 0, 0), device)
            images.append(net.rope_embedder(image))
        stream, of_text, mask, *_ = net._prepare_sequence(
            parts, places, pads, net.cap_pad_token, None, device
        )
        for layer in net.context_refiner:
            stream = layer.forward(stream, mask, of_text)
        counted = torch.ones_like(stream[..., 0], dtype=torch.bool) if mask is None else mask
        return NegativeText(stream, torch.cat([torch.stack(images), of_text], 1), counted)

    def embedding_at(
        self, guided: GuidedPass, times: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        made: torch.Tensor = self.denoiser.t_embedder.forward(times * self.denoiser.t_scale)
        return made

    def read(
        self, name: str, block: Any, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        modulation = block.adaLN_modulation.forward(embedding.to(stream.dtype))
        scale, *rest = modulation[:, None].chunk(4, -1)
        x = block.attention_norm1.forward(stream) * (1 + scale)
        return text_heads(block.attention, x), rest

    def rotated(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        turned = pairs * over_rows(positions, len(x))[:, :, None]
        return torch.view_as_real(turned).flatten(3).type_as(x)

    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        gate, scale, gate_ff = rest
        out = block.attention.to_out[0].forward(text)
        stream = stream + gate.tanh() * block.attention_norm2.forward(out)
        hidden = block.ffn_norm1.forward(stream) * (1 + scale)
        hidden = block.ffn_norm2.forward(block.feed_forward.forward(hidden))
        followed: torch.Tensor = stream + gate_ff.tanh() * hidden
        return followed

    def image_start(self, guided: GuidedPass, tokens: torch.Tensor) -> int:
        return 0

    def image_tokens(self, guided: GuidedPass) -> int:
        return padded(super().image_tokens(guided))

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        latents = torch.stack(list(given["x"])).squeeze(2)
        texts = given["cap_feats"]
        text = self.made_of("text", texts, lambda: as_conditions(texts))
        return DenoiserCall(self.on_grid(latents), given["t"], text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return super().on_grid(latents.squeeze(2) if latents.ndim == 5 else latents)

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        assert guided.call is not None
        text = guided.call.text
        added = guided.added_text(text.embeds)
        if added is text.embeds:
            return {}
        return {"cap_feats": as_list(TextConditions(added, mask=text.mask))}

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        assert guided.call is not None
        text = guided.call.text
        negative = as_list(guided.negative.expand(len(text)))
        return {
            "x": [*given["x"], *given["x"]],
            "t": torch.cat([given["t"], given["t"]]),
            "cap_feats": [*negative, *given["cap_feats"]],
        }

    def _end(self, guided: GuidedPass, module: Any, args: Any, output: Any) -> Any:
        listed = output[0]
        made = super()._end(guided, module, args, (torch.stack(list(listed)), *output[1:]))
        return None if made is None else (list(made[0].unbind()), *made[1:])

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"cap_feats": as_list(text)}

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        given = [x for x in (text.embeds, text.mask) if x is not None]
        texts = self.made_of("list", given, lambda: as_list(text))  # the same at every step
        made = self.denoiser(
            list(latents[:, :, None].unbind()), self.timestep(time), texts,
            patch_size=self.patch, return_dict=False,
        )[0]  # fmt: skip
        return self.sign * torch.stack(list(made)).squeeze(2)

    # -- the pipeline -----------------------------------------------------------------------

    def refusal(self, pipe: Any) -> str | None:
        if self.denoiser.siglip_embedder is not None:
            return "its denoiser reads images in addition to the one that it generates"
        if getattr(pipe, "controlnet", None) is not None:
            return "its ControlNet takes lists, which are not doubled for a refresh"
        return None

    def encoding(self, texts: Any) -> dict[str, Any]:
        return {"prompt": list(texts)}

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, negative = encoded
        return as_conditions(prompt), as_conditions(negative) if negative else None

    def default_latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the pipeline's default, 1024 x 1024 pixels."""
        return int(self.denoiser.in_channels), 128, 128


def padded(length: int) -> int:
    """The next multiple of :data:`MULTIPLE`."""
    return length + -length % MULTIPLE


def as_conditions(texts: Any) -> TextConditions:
    """A list of (L, D) as (N, L, D) and its mask."""
    counted = [torch.ones_like(text[:, 0], dtype=torch.long) for text in texts]
    embeds, mask = (pad_sequence(list(x), batch_first=True) for x in (texts, counted))
    return TextConditions(embeds, mask=mask)


def as_list(text: TextConditions) -> list[torch.Tensor]:
    """Each prompt without its padding."""
    return [row[:count] for row, count in zip(text.embeds, _counts(text), strict=True)]


def _mask(text: TextConditions) -> torch.Tensor:
    return torch.ones_like(text.embeds[..., 0]).long() if text.mask is None else text.mask


def _counts(text: TextConditions) -> list[int]:
    if text.mask is None:
        return [text.embeds.shape[1]] * len(text)
    counts: list[int] = text.mask.long().sum(1).tolist()
    return counts
