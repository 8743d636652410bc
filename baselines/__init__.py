"""Other methods that remove the second pass of CFG, as guides like our own.

They train in the same loop, where they train at all, and plug into the same pipelines, so that
they can be measured side by side. Each file is one method: its paper, its equation, and what
of it is ours to choose.
"""

from functools import partial

from baselines.agd import AdditiveAdapters, CrossAttentionAdapters
from baselines.dice import TextSharpener
from baselines.guidance_lora import GuidanceLoRA
from baselines.guided_distillation import WholeDenoiser
from baselines.training_free import AdaptiveGuidance, GuidanceInterval, PartialGuidance

RULES = {
    "guidance-interval": partial(GuidanceInterval, 200, 800),
    "adaptive-guidance": partial(AdaptiveGuidance, 0.99),
}
"""Those that need no training, by name."""

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
