"""The paper's full guide: a copy of the base's encoder, shaped like a ControlNet. UNets only.

*Plug-and-Play Diffusion Distillation*, section 3: the copy has the inputs of the base and the
guidance scale; each of its features passes a 1x1 convolution that starts at zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from pilotfish.backbones import Backbone
from pilotfish.guidance import fourier_features, guidance_strength, per_sample
from pilotfish.guides.base import Guide
from pilotfish.interface import GuideError, GuideInputs, GuideOutput

SCALE_FEATURES = 64


class FullGuide(Guide, guide_type="full"):
    """The largest of the guides, about 40 % of the base's parameters.

    Args:
        signature: of the denoiser, a UNet.
        unet_config: the configuration of the UNet whose encoder is copied.
        guidance_scale_range: the (low, high) of w in training.
        times: of a guide distilled to few steps, those that it was trained at.
        refresh_ratio: see :attr:`Guide.refresh_ratio`.
        trained_on: name and revision of the base, where they are known.
        teacher: see :class:`Guide`.
    """

    learning_rate = 5e-4

    @register_to_config
    def __init__(
        self,
        signature: dict[str, Any],
        unet_config: dict[str, Any],
        guidance_scale_range: tuple[float, float] = (1.0, 8.0),
        times: Sequence[float] | None = None,
        refresh_ratio: float = 0.0,
        trained_on: dict[str, str] | None = None,
        teacher: dict[str, Any] | None = None,
        pilotfish_version: str = "0.2.0",
    ) -> None:
        super().__init__()
        self.encoder = UNet2DConditionModel.from_config(unet_config)
        del self.encoder.up_blocks, self.encoder.conv_out, self.encoder.conv_norm_out
        time_width = self.encoder.time_embedding.linear_2.out_features
        self.scale_embedding = nn.Linear(SCALE_FEATURES, time_width)
        channels = [width for width, _ in signature["encoder"]]
        self.skip_outputs = nn.ModuleList([nn.Conv2d(c, c, 1) for c in channels])
        self.mid_output = nn.Conv2d(signature["middle"], channels[-1], 1)
        for layer in [self.scale_embedding, *self.skip_outputs, self.mid_output]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def for_denoiser(cls, denoiser: Any, prediction_type: str, **config: Any) -> Self:
        """A fresh guide for a UNet, its encoder copied from it.

        Raises:
            GuideError: the denoiser is no UNet.
        """
        backbone = Backbone.of(denoiser)
        unet = backbone.denoiser
        if not isinstance(unet, UNet2DConditionModel) or unet.mid_block is None:
            raise GuideError(
                f"the full guide copies a UNet's encoder and mid block, and {type(unet).__name__} "
                "has not both; use the tiny guide"
            )
        signature = backbone.signature(prediction_type)
        # a guide is given the latents alone, without the mask and image of inpainting beside them
        channels = signature["head"]["channels"]
        plain = {k: v for k, v in unet.config.items() if not k.startswith("_")}
        guide = cls(signature, plain | {"in_channels": channels}, **config)
        # a LoRA wraps layers, whose own weights are copied
        weights = {k.replace(".base_layer.", "."): v for k, v in unet.state_dict().items()}
        weights["conv_in.weight"] = weights["conv_in.weight"][:, :channels]
        if missing := guide.encoder.load_state_dict(weights, strict=False).missing_keys:
            raise GuideError(f"the UNet has no {missing[0]}, which the full guide copies")
        return guide

    def forward(self, inputs: GuideInputs, modulations: Any = None) -> GuideOutput:
        net, z, text = self.encoder, inputs.latents, inputs.text.embeds
        timestep = inputs.time * 1000
        embedding = net.time_embedding(net.get_time_embed(z, timestep))
        added = net.get_aug_embed(embedding, text, dict(inputs.added_cond_kwargs))
        scale = fourier_features(inputs.guidance_scale, SCALE_FEATURES, longest=32.0)
        embedding = embedding + self.scale_embedding(scale.to(z.dtype))
        if added is not None:
            embedding = embedding + added
        text = net.process_encoder_hidden_states(text, dict(inputs.added_cond_kwargs))
        hidden = net.conv_in(z)
        features = [hidden]
        for block in net.down_blocks:
            cross = {"encoder_hidden_states": text} if _crosses(block) else {}
            hidden, made = block(hidden, temb=embedding, **cross)
            features += made
        cross = {"encoder_hidden_states": text} if _crosses(net.mid_block) else {}
        hidden = net.mid_block(hidden, embedding, **cross)
        strength = per_sample(guidance_strength(inputs.guidance_scale), z)
        skips = [strength * out(f) for out, f in zip(self.skip_outputs, features, strict=True)]
        mid = strength * self.mid_output(hidden)
        return GuideOutput(encoder=(tuple(skips), mid))


def _crosses(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))
