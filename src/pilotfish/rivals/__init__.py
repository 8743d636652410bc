"""Other methods that remove the second pass of CFG, as guides like our own.

They train in the same loop, where they train at all, and plug into the same pipelines, so that
they can be measured side by side. Each file is one method: its paper, its equation, and what
of it is ours to choose.
"""

from pilotfish.rivals.agd import AdditiveAdapters, CrossAttentionAdapters
from pilotfish.rivals.dice import TextSharpener
from pilotfish.rivals.guidance_lora import GuidanceLoRA
from pilotfish.rivals.guided_distillation import WholeDenoiser
from pilotfish.rivals.training_free import AdaptiveGuidance, GuidanceInterval, PartialGuidance

__all__ = [
    "AdaptiveGuidance",
    "AdditiveAdapters",
    "CrossAttentionAdapters",
    "GuidanceInterval",
    "GuidanceLoRA",
    "PartialGuidance",
    "TextSharpener",
    "WholeDenoiser",
]
