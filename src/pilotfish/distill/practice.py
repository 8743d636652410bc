"""Fine-tunes to practise on, so that a guide learns to be moved.

A guide trained on one base alone leans on what only that base does. It is therefore also
trained on fine-tunes of the base, each against that fine-tune's own CFG, whole and half way
between the base and it. What is learnt is still one guide, and the fine-tunes on which it will
be used need not be among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

STRENGTHS = (1.0, 0.5)
"""How far from the base towards a fine-tune the hosts lie."""

Weights = Mapping[str, torch.Tensor]


class PracticeHosts:
    """One denoiser that is the base, or for a while one of its fine-tunes.

    Args:
        denoiser: the base. Its device holds one host; all of them are kept on the CPU.
        fine_tunes: the weights of each, by the names that the base has.
        share: of the training steps, those on fine-tunes.
    """

    def __init__(self, denoiser: nn.Module, fine_tunes: Sequence[Weights], share: float) -> None:
        self.denoiser, self.share, self.worn = denoiser, share if fine_tunes else 0.0, 0
        base = {k: v.cpu().clone() for k, v in denoiser.state_dict().items()} if fine_tunes else {}
        self.weights: list[Weights] = [base]
        for weights in fine_tunes:
            for strength in STRENGTHS:
                self.weights.append(
                    {k: torch.lerp(v, weights[k].to(v), strength) for k, v in base.items()}
                )

    def __len__(self) -> int:
        return len(self.weights)

    def draw(self, generator: torch.Generator) -> int:
        """Whose turn it is: 0 is the base."""
        if self.share == 0 or float(torch.rand(1, generator=generator)) >= self.share:
            return 0
        return int(torch.randint(1, len(self), (1,), generator=generator))

    @torch.no_grad()
    def wear(self, index: int) -> None:
        """Make the denoiser that host; 0 is the base, bit for bit as it was."""
        if index != self.worn:
            for name, tensor in self.denoiser.state_dict().items():
                tensor.copy_(self.weights[index][name])
            self.worn = index
