"""AuraFlowTransformer2DModel: AuraFlow.

Text and image are two streams of tokens in the first blocks, and one sequence with the text first
in the others. Learned register tokens come before the text. Text has no positions and no mask: what
pads a prompt is zero. Flow matching; the timestep is sigma.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AuraFlowTransformer2DModel

from pilotfish.backbones.context import GuidedPass
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joined_transformer import (
    JoinedTransformerBackbone,
    NegativeStream,
    NegativeText,
)
from pilotfish.backbones.joint_attention import attention, text_heads
from pilotfish.interface import TextConditions


class AuraFlowDiTBackbone(JoinedTransformerBackbone):
    """See the module."""

    family = "aura-flow-dit"
    denoisers = (AuraFlowTransformer2DModel,)
    parameters = ("hidden_states", "encoder_hidden_states", "timestep")
    cfg_by_argument = True
    takes_sigma = True
    stacks = ("joint_transformer_blocks", "single_transformer_blocks")
    embedders = ("context_embedder", "time_step_embed", "time_step_proj")

    # -- hooks ------------------------------------------------------------------------------

    def place_text(self, hooks: Hooks, stream: NegativeStream) -> None:
        super().place_text(hooks, stream)
        if stream.blocks:
            hooks.keep(self.denoiser.time_step_proj, "embedding")

    def negative_text(self, guided: GuidedPass) -> NegativeText:
        text = self.embedded_negative(guided)
        registers = self.denoiser.register_tokens.to(text).expand(len(text), -1, -1)
        return NegativeText(torch.cat([registers, text], 1))

    def embedding_at(
        self, guided: GuidedPass, times: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        net = self.denoiser
        embedded = net.time_step_embed.forward(times).to(stream.dtype)
        made: torch.Tensor = net.time_step_proj.forward(embedded)
        return made

    def read(
        self, name: str, block: Any, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        norm = block.norm1_context if name.startswith("joint") else block.norm1
        x, *rest = norm.forward(stream, emb=embedding)
        return text_heads(block.attn, x), rest

    def attention(
        self, block: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        return attention(q, k, v, mask, block.attn.scale)

    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        if block.attn.add_q_proj is None:  # text and image take the same layers
            last, norm, ff = block.attn.to_out[0], block.norm2, block.ff
        else:
            last, norm, ff = block.attn.to_add_out, block.norm2_context, block.ff_context
        gate, shift, scale, gate_ff = (r[:, None] for r in rest)
        hidden = norm.forward(stream + gate * last.forward(text))
        followed: torch.Tensor = stream + gate_ff * ff.forward(hidden * (1 + scale) + shift)
        return followed

    # -- the pipeline -----------------------------------------------------------------------

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, _, negative, _ = encoded  # the masks have been applied
        return TextConditions(prompt), None if negative is None else TextConditions(negative)

    def default_latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the pipeline's default, 1024 x 1024 pixels."""
        return int(self.denoiser.config.in_channels), 128, 128
