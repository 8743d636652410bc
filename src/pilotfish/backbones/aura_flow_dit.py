"""AuraFlowTransformer2DModel: AuraFlow.

Text and image are two streams of tokens in the first blocks, and one sequence with the text first
in the others. Learned register tokens come before the text. Text has no positions and no mask: what
pads a prompt is zero. Flow matching; the timestep is sigma.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AuraFlowTransformer2DModel

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.doubling import without_mask
from pilotfish.backbones.extrapolation import joined_attention, up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.tokens import patchify, to_map, to_tokens
from pilotfish.interface import TextConditions


class AuraFlowDiTBackbone(Backbone):
    """See the module."""

    family = "aura-flow-dit"
    denoisers = (AuraFlowTransformer2DModel,)
    joint_attention = ("whole",)
    parameters = ("hidden_states", "encoder_hidden_states", "timestep")
    cfg_by_argument = True

    def sites(self) -> dict[str, Any]:
        net = self.denoiser
        kinds = ("joint_transformer_blocks", "single_transformer_blocks")
        names = [f"{kind}.{i}" for kind in kinds for i in range(len(getattr(net, kind)))]
        return {
            "text_dim": plain(net.context_embedder).in_features,
            "attention": [[f"{name}.attn", net.config.num_attention_heads] for name in names],
            "modulation": [],
            "layers": [[name, net.inner_dim] for name in names],
            "head": {
                "module": "proj_out",
                "features": plain(net.proj_out).in_features,
                "channels": plain(net.proj_out).out_features,
            },
        }

    # -- hooks ------------------------------------------------------------------------------

    def place(self, hooks: Hooks) -> None:
        net, names = self.denoiser, hooks.guide.extrapolated
        attention = up_to_last([name for name, _ in self.sites()["attention"]], names)

        def timed(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            guided.scratch["embedding"] = output

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            """The prompts are embedded: begin the negative prompt's stream."""
            text = guided.cache.made_by(
                module, lambda: module.forward(guided.negative.embeds), [module]
            )
            registers = net.register_tokens.to(text).expand(len(text), -1, -1)
            stream = torch.cat([registers, text], 1)
            guided.scratch["stream", attention[0]] = stream.expand(len(output), -1, -1)

        if attention:
            hooks.after(net.time_step_proj, timed)
            hooks.after(net.context_embedder, embedded)
        for i, name in enumerate(attention):
            following = attention[i + 1] if i + 1 < len(attention) else None
            block = hooks.modules[name.removesuffix(".attn")]
            self._place_attention(hooks, name, block, following)
        self.place_residuals(hooks)

    def _place_attention(self, hooks: Hooks, name: str, block: Any, following: str | None) -> None:
        """Extrapolate the attention of one block where the guide has a gain for it, and take the
        negative prompt's stream to the next block."""
        layer = block.attn
        if name.startswith("joint"):
            norm, second_norm, ff = block.norm1_context, block.norm2_context, block.ff_context
            of_text = (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)
            norms, last = (layer.norm_added_q, layer.norm_added_k), layer.to_add_out
        else:
            norm, second_norm, ff = block.norm1, block.norm2, block.ff
            of_text = (layer.to_q, layer.to_k, layer.to_v)
            norms, last = (layer.norm_q, layer.norm_k), layer.to_out[0]

        def attend(
            guided: GuidedPass, stream: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
            v: torch.Tensor, output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            embedding = guided.scratch["embedding"]
            x, gate, shift, scale, gate_ff = norm.forward(stream, emb=embedding)
            length, size = stream.shape[1], q.shape[-1]
            q_n, k_n, v_n = (part.forward(x).unflatten(-1, (-1, size)) for part in of_text)
            text = q.shape[1] - self._pixels(guided)  # of the prompt, before the image
            joined = F.scaled_dot_product_attention(
                torch.cat([norms[0].forward(q_n), q[:, text:]], 1).transpose(1, 2),
                torch.cat([norms[1].forward(k_n), k[:, text:]], 1).transpose(1, 2),
                torch.cat([v_n, v[:, text:].unflatten(-1, (-1, size))], 1).transpose(1, 2),
                scale=layer.scale,
            )
            made = joined.transpose(1, 2)
            if following is not None:
                out = gate[:, None] * last.forward(made[:, :length].flatten(2))
                hidden = second_norm.forward(stream + out)
                hidden = ff.forward(hidden * (1 + scale[:, None]) + shift[:, None])
                guided.scratch["stream", following] = stream + gate_ff[:, None] * hidden
            if not guided.extrapolates(name):
                return None
            own = output[:, text:].unflatten(-1, (layer.heads, -1))
            changed = guided.extrapolate(name, own, made[:, length:], by_head=True).flatten(2)
            return torch.cat([output[:, :text], changed.to(output.dtype)], 1) if text else changed

        joined_attention(hooks, name, layer, attend)

    @staticmethod
    def _pixels(guided: GuidedPass) -> int:
        """The number of the image's tokens."""
        assert guided.call is not None
        return guided.call.latents.shape[-2:].numel()

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        assert guided.call is not None
        tokens = output if isinstance(output, torch.Tensor) else output[1]  # (text, image)
        return to_map(tokens[:, -self._pixels(guided) :], guided.call.latents.shape[-2:])

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        tokens = to_tokens(made)
        if not isinstance(output, torch.Tensor):
            return output[0], tokens
        text = output[:, : -tokens.shape[1]]
        return torch.cat([text, tokens.to(output.dtype)], 1) if text.shape[1] else tokens

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        text = TextConditions(given["encoder_hidden_states"])
        return DenoiserCall(self.on_grid(given["hidden_states"]), given["timestep"], text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return patchify(latents, self.denoiser.config.patch_size)

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        return {"encoder_hidden_states": without_mask(text)}

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        made: torch.Tensor = self.denoiser(
            hidden_states=latents, timestep=self.timestep(time),
            encoder_hidden_states=text.embeds, return_dict=False,
        )[0]  # fmt: skip
        return made

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        return timestep.float()

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        return time

    def split_encoded(self, encoded: Any) -> tuple[TextConditions, TextConditions | None]:
        prompt, _, negative, _ = encoded  # the masks have been applied
        return TextConditions(prompt), None if negative is None else TextConditions(negative)

    def default_latent_shape(self) -> tuple[int, ...]:
        """(C, h, w) of the pipeline's default, 1024 x 1024 pixels."""
        return int(self.denoiser.config.in_channels), 128, 128
