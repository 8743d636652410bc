"""Fine-tunes to practise on, so that a guide learns to be moved.

A guide trained on one base alone leans on what only that base does. It is therefore also
trained on fine-tunes of the base, each against that fine-tune's own CFG. What is learnt is still
one guide, and the fine-tunes on which it will be used need not be among them.

Fine-tunes are few, and what they changed can be scaled and added (task arithmetic, arXiv
2212.04089): each is met half way from the base, whole and exaggerated, and mixed with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import nn

STRENGTHS = (0.5, 1.0, 1.5)
"""How far from the base towards a fine-tune the hosts lie, and beyond it."""

Weights = Mapping[str, torch.Tensor]


class PracticeHosts:
    """One denoiser that is the base, or for a while one of its fine-tunes.

    Args:
        denoiser: the base. Its device holds one host; the base and the fine-tunes are kept on
            the CPU, and the hosts made of them as they are worn.
        fine_tunes: the weights of each, by the names that the base has.
        share: of the training steps, those on fine-tunes.
    """

    def __init__(self, denoiser: nn.Module, fine_tunes: Sequence[Weights], share: float) -> None:
        self.denoiser, self.share, self.worn = denoiser, share if fine_tunes else 0.0, 0
        self.base: Weights = {}
        if fine_tunes:
            self.base = {k: v.cpu().clone() for k, v in denoiser.state_dict().items()}
        self.fine_tunes = [
            {k: weights[k].to(v) for k, v in self.base.items()} for weights in fine_tunes
        ]
        self.mixtures = mixtures(len(fine_tunes))

    def __len__(self) -> int:
        return 1 + len(self.mixtures)

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
                tensor.copy_(self._weight(index, name))
            self.worn = index

    def _weight(self, index: int, name: str) -> torch.Tensor:
        made = base = self.base[name]
        shares = self.mixtures[index - 1] if index else ()
        for share, weights in zip(shares, self.fine_tunes, strict=False):
            made = made + share * (weights[name] - base)
        return made


def mixtures(n: int) -> list[tuple[float, ...]]:
    """The share of each of ``n`` fine-tunes in every practice host: each alone, by all
    strengths; every two; all. Those of k fine-tunes have ``k ** -0.5`` of each: changes that have
    nothing to do with one another then add up to the length of one."""

    def of(members: tuple[int, ...], share: float) -> tuple[float, ...]:
        return tuple(share if i in members else 0.0 for i in range(n))

    alone = [of((i,), share) for i in range(n) for share in STRENGTHS]
    together = [of(m, 2**-0.5) for m in combinations(range(n), 2)]
    return alone + together + ([of(tuple(range(n)), n**-0.5)] if n > 2 else [])
