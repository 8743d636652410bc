"""The methods that are compared, by name: guides that are trained, and rules that are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from baselines.training_free import AdaptiveGuidance, GuidanceInterval, PartialGuidance

DEFAULT = "tiny"
"""The guide that one gets who asks for none by name."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: how tables and plots call it.
        settings: of its training, over those that all share.
        one_scale: whether it learns one guidance scale, and a dial is turned for the others.
        rule: makes it, where it needs no training.
    """

    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    one_scale: bool = False
    rule: Callable[[], PartialGuidance] | None = None


METHODS: dict[str, Method] = {
    "tiny": Method("Pilotfish, tiny", {"guide_type": "tiny"}),
    "external": Method("Plug-and-Play, tiny", {"guide_type": "external"}),
    "full": Method("Plug-and-Play, full", {"guide_type": "full"}),
    "agd": Method("AGD, additive", {"guide_type": "agd"}),
    "agd-attention": Method("AGD, cross-attention", {"guide_type": "agd-attention"}),
    "dice": Method("DICE", {"guide_type": "dice"}, one_scale=True),
    "cfg-lora": Method("CFG LoRA", {"guide_type": "cfg-lora"}, one_scale=True),
    "guided-distillation": Method("Guided Distillation", {"guide_type": "guided-distillation"}),
    "guidance-interval": Method("guidance interval", rule=partial(GuidanceInterval, 200, 800)),
    "adaptive-guidance": Method("adaptive guidance", rule=partial(AdaptiveGuidance, 0.99)),
}
