"""Families of denoisers: what a guide may change in each, and how it is called.

A new family is one file with a subclass of :class:`Backbone`, and one line here.
"""

from pilotfish.backbones.aura_flow_dit import AuraFlowDiTBackbone
from pilotfish.backbones.base import Backbone
from pilotfish.backbones.chroma_dit import ChromaDiTBackbone
from pilotfish.backbones.cogview4_dit import CogView4DiTBackbone
from pilotfish.backbones.compiled import is_compiled, watch_hooks
from pilotfish.backbones.context import DenoiserCall, GuidedPass, current_pass
from pilotfish.backbones.cross_attention_dit import CrossAttentionDiTBackbone
from pilotfish.backbones.degraded import degraded
from pilotfish.backbones.doubling import twice_arguments
from pilotfish.backbones.flux2_dit import Flux2DiTBackbone
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joint_dit import JointDiTBackbone
from pilotfish.backbones.ltx_dit import LTXBackbone
from pilotfish.backbones.one_stream_dit import OneStreamDiTBackbone
from pilotfish.backbones.origin import Origin, portable_path, public_name
from pilotfish.backbones.qwen_dit import QwenDiTBackbone
from pilotfish.backbones.unet import UNetBackbone
from pilotfish.backbones.video_dit import VideoDiTBackbone
from pilotfish.backbones.z_image_dit import ZImageDiTBackbone

__all__ = [
    "AuraFlowDiTBackbone",
    "Backbone",
    "ChromaDiTBackbone",
    "CogView4DiTBackbone",
    "CrossAttentionDiTBackbone",
    "DenoiserCall",
    "Flux2DiTBackbone",
    "GuidedPass",
    "Hooks",
    "JointDiTBackbone",
    "LTXBackbone",
    "OneStreamDiTBackbone",
    "Origin",
    "QwenDiTBackbone",
    "UNetBackbone",
    "VideoDiTBackbone",
    "ZImageDiTBackbone",
    "current_pass",
    "degraded",
    "is_compiled",
    "portable_path",
    "public_name",
    "twice_arguments",
    "watch_hooks",
]
