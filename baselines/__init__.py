"""Other methods that remove the second pass of CFG, compared with the library's own guides.

One file is one method: its paper, its equation, its settings and its network. A trained method is
a :class:`~pilotfish.guides.Guide` and a training-free one a :class:`~baselines.training_free.Rule`.
Importing a file registers its method, so a new method is a file and a line here. LinearAG is not
registered: it is fitted to a base first (:func:`baselines.linear_ag.fit`).
"""

from baselines.agd import AdditiveAGD, CrossAttentionAGD
from baselines.dice import DICE
from baselines.guidance_lora import GuidanceLoRA
from baselines.guided_distillation import GuidedDistillation
from baselines.linear_ag import LinearAG
from baselines.reuse import CompressGuidance, DeltaReuse
from baselines.training_free import RULES, AdaptiveGuidance, GuidanceInterval, Rule

__all__ = [
    "DICE",
    "RULES",
    "AdaptiveGuidance",
    "AdditiveAGD",
    "CompressGuidance",
    "CrossAttentionAGD",
    "DeltaReuse",
    "GuidanceInterval",
    "GuidanceLoRA",
    "GuidedDistillation",
    "LinearAG",
    "Rule",
]
