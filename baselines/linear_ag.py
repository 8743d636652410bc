"""LinearAG (Castillo et al., arXiv 2312.12487): the unconditional prediction by linear regression.

In a step i of one pass the unconditional prediction is a linear function of the predictions that
are known by then::

    eps(n)_i = sum_{j <= i} a_ij eps(c)_j + sum_{j < i, j guided} b_ij eps(n)_j

The coefficients are scalars, one set for each step. They are the least squares on trajectories of
CFG, so the rule is fitted to one base, number of steps and w; no network is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from baselines.training_free import Rule, Step
from pilotfish.backbones import Backbone

TOLERANCE = 1e-10
"""Directions of the regression whose share of the largest variance is below this are left out."""


def alternating(count: int, steps: int) -> tuple[int, ...]:
    """Every second step from 0, as the paper has them in the first half, then none. More than half
    of the steps fill the gaps from the first one on; all where there are fewer."""
    order = [*range(0, steps, 2), *range(1, steps, 2)]
    return tuple(sorted(order[:count]))


class LinearAG(Rule):
    """See the module; :func:`fit` makes one.

    Args:
        at: the steps that run both passes.
        coefficients: (T, 2T) of the conditional and then the unconditional predictions of all
            steps, one row for each step.
    """

    title = "LinearAG"

    def __init__(self, at: Sequence[int], coefficients: torch.Tensor) -> None:
        self.at, self.coefficients = frozenset(at), coefficients
        self.reset()

    def reset(self) -> None:
        self.known: dict[int, torch.Tensor] = {}

    def is_guided(self, step: Step) -> bool:
        """As of the class.

        Raises:
            ValueError: the call has another number of steps than the trajectories of the fit.
        """
        if step.count != len(self.coefficients):
            raise ValueError(
                f"LinearAG was fitted for {len(self.coefficients)} steps, not for {step.count}"
            )
        self.now = step
        return step.index in self.at

    def after_both(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        self.known[self.now.index] = conditional
        self.known[len(self.coefficients) + self.now.index] = unconditional
        return unconditional

    def after_one(self, conditional: torch.Tensor) -> torch.Tensor:
        self.known[self.now.index] = conditional
        row = self.coefficients[self.now.index].to(conditional)
        return torch.stack([row[i] * known for i, known in self.known.items()]).sum(0)


class _Recorder(Rule):
    """Both passes in every step; their predictions are kept.

    Attributes:
        conditional: (N, C, h, w) of each step of the running call.
        unconditional: the same.
    """

    title = "CFG"

    def reset(self) -> None:
        self.conditional: list[torch.Tensor] = []
        self.unconditional: list[torch.Tensor] = []

    def is_guided(self, step: Step) -> bool:
        return True

    def after_both(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> torch.Tensor:
        self.conditional.append(conditional)
        self.unconditional.append(unconditional)
        return unconditional


@torch.no_grad()
def gram_matrix(
    pipe: Any, prompts: Sequence[str], *, seed: int = 0, guidance_scale: float = 4.0,
    num_inference_steps: int = 25, batch_size: int = 32,
) -> torch.Tensor:  # fmt: skip
    """The products of all predictions of CFG with one another, summed over trajectories.

    Args:
        prompts: of the trajectories, one each.
        seed: of the first; the others follow.

    Returns:
        (2T, 2T) for T denoiser calls, the conditional predictions first.

    Raises:
        ValueError: no prompt.
    """
    if not prompts:
        raise ValueError("LinearAG is fitted on CFG trajectories of at least one prompt")
    recorder, total, call = _Recorder(), torch.zeros(()), Backbone.of_pipeline(pipe).call_arguments
    pipe.set_progress_bar_config(disable=True)
    for i in range(0, len(prompts), batch_size):
        texts = list(prompts[i : i + batch_size])
        with recorder.attached(pipe):
            pipe(
                texts, num_inference_steps=num_inference_steps,
                **call(pipe, guidance_scale, len(texts)),
                generator=[torch.Generator().manual_seed(seed + i + j) for j in range(len(texts))],
                output_type="latent",
            )  # fmt: skip
        rows = torch.stack([*recorder.conditional, *recorder.unconditional]).flatten(1).double()
        total = total + rows @ rows.T
    return total


def fit(gram: torch.Tensor, at: Sequence[int]) -> LinearAG:
    """The least squares for the steps that do not run both passes.

    Args:
        gram: (2T, 2T) of :func:`gram_matrix`.
        at: the steps that run both, counted from 0.
    """
    steps = len(gram) // 2
    coefficients = torch.zeros(steps, 2 * steps, dtype=gram.dtype, device=gram.device)
    for i in range(steps):
        if i in at:
            continue
        known = [*range(i + 1), *(steps + j for j in at if j < i)]
        inverse = torch.linalg.pinv(gram[known][:, known], rtol=TOLERANCE, hermitian=True)
        coefficients[i, known] = inverse @ gram[known, steps + i]
    return LinearAG(at, coefficients)
