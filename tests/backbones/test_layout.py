"""What there is in a UNet, by its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pilotfish.backbones import decoder_layers, fingerprint


def test_a_decoder_without_attention_has_fewer_layers(make_unet: Callable[..., Any]) -> None:
    unet = make_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    layers = decoder_layers(unet.config)
    assert list(layers.values()) == [16, 16, 8, 8, 8, 8]
    assert all(unet.get_submodule(name) is not None for name in layers)


def test_the_fingerprint_tells_denoisers_apart(make_unet: Callable[..., Any]) -> None:
    plain = fingerprint(make_unet(), "epsilon")
    assert plain == fingerprint(make_unet(seed=1), "epsilon")
    assert plain != fingerprint(make_unet(), "v_prediction")
    assert plain != fingerprint(make_unet(block_out_channels=(8, 32)), "epsilon")
    assert plain != fingerprint(make_unet(layers_per_block=2), "epsilon")
    assert plain != fingerprint(make_unet(cross_attention_dim=32), "epsilon")
    assert plain != fingerprint(make_unet(addition_embed_type=None), "epsilon")
