"""Fine-tune augmentation: training on fine-tunes of the base, so that a guide transfers to others.

A guide trained on the base alone relies on features that only the base has. It is therefore also
trained on fine-tunes, each against its own CFG. The result is one guide.

Fine-tunes are few, but their weight changes can be scaled and added (task arithmetic, arXiv
2212.04089): each is used at half, full, one and a half and two and a half times its change, and in
mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import nn

STRENGTHS = (0.5, 1.0, 1.5, 2.5)
"""Multiples of a fine-tune's change of the weights."""

Weights = Mapping[str, torch.Tensor]


class FineTunes:
    """One denoiser that holds the weights of the base or of a mixture of its fine-tunes.

    Args:
        denoiser: the base. Its device holds one model; the weights of the base and of the
            fine-tunes stay on the CPU, and mixtures are computed when they are activated.
        weights: the weights of each fine-tune, by the base's names.
        prob: the probability of a training step on a mixture.
    """

    def __init__(self, denoiser: nn.Module, weights: Sequence[Weights], prob: float) -> None:
        self.denoiser, self.prob, self.active = denoiser, prob if weights else 0.0, 0
        self.base: Weights = {}
        if weights:
            self.base = {k: v.cpu().clone() for k, v in denoiser.state_dict().items()}
        self.weights: list[Weights] = [
            {k: one[k].to(v) for k, v in self.base.items()} for one in weights
        ]
        self.mixtures = mixtures(len(weights))

    def __len__(self) -> int:
        return 1 + len(self.mixtures)

    def draw(self, generator: torch.Generator) -> int:
        """The model of a training step; 0 is the base."""
        if self.prob == 0 or float(torch.rand(1, generator=generator)) >= self.prob:
            return 0
        return int(torch.randint(1, len(self), (1,), generator=generator))

    @torch.no_grad()
    def activate(self, index: int) -> None:
        """Load the weights of a model; 0 is the base, bit for bit."""
        if index != self.active:
            for name, tensor in self.denoiser.state_dict().items():
                tensor.copy_(self._mixed(index, name))
            self.active = index

    def _mixed(self, index: int, name: str) -> torch.Tensor:
        mixed = base = self.base[name]
        if index:
            for share, weights in zip(self.mixtures[index - 1], self.weights, strict=True):
                if share:
                    mixed = mixed + share * (weights[name] - base)
        return mixed


def mixtures(n: int) -> list[tuple[float, ...]]:
    """The share of each of ``n`` fine-tunes in every mixture: each alone at every strength, every
    two, and all. A mixture of k takes ``k ** -0.5`` of each, so that uncorrelated changes add up to
    the norm of one."""

    def of(members: tuple[int, ...], share: float) -> tuple[float, ...]:
        return tuple(share if i in members else 0.0 for i in range(n))

    alone = [of((i,), share) for i in range(n) for share in STRENGTHS]
    together = [of(m, 2**-0.5) for m in combinations(range(n), 2)]
    return alone + together + ([of(tuple(range(n)), n**-0.5)] if n > 2 else [])
