"""Methods that need no training: CFG in some of the steps only.

A step without guidance costs one pass. Which steps may go without?

- :class:`GuidanceInterval` (Kynkäänniemi et al., arXiv 2404.07724): those outside an interval
  of noise levels. Guidance at high noise narrows what is drawn, at low noise it does nothing.
- :class:`AdaptiveGuidance` (Castillo et al., arXiv 2312.12487): all that follow once the two
  predictions have come to agree, ``cos(eps(c), eps(n)) > threshold``.

The pipeline goes on as it does under CFG. Where it asks the denoiser for a doubled batch that
is not needed, the prompt's half is computed and answered twice, so that equation (1) gives the
conditional prediction.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F


class PartialGuidance:
    """CFG in some of the steps. It attaches to a pipeline as a guide does."""

    def needed(self, timestep: float) -> bool:
        """Whether the step at ``timestep`` in [0, 1000) is guided."""
        raise NotImplementedError

    def begin(self) -> None:
        """A picture begins."""

    def saw(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> None:
        """A guided step made these predictions, each (N, C, h, w)."""

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[Any]:
        """The pipeline with this method in place of CFG in every step."""
        last, saving = [float("-inf")], [False]

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            sample, timestep = args[0], float(torch.as_tensor(args[1]).reshape(-1)[0])
            # some schedulers ask twice at one timestep, but never at the first
            if timestep > last[0] or timestep == float(pipe.scheduler.timesteps[0]):
                self.begin()
            last[0] = timestep
            saving[0] = pipe.do_classifier_free_guidance and not self.needed(timestep)
            if not saving[0]:
                return None
            n = len(sample)
            return (sample[n // 2 :], *args[1:]), {k: _second(v, n) for k, v in kwargs.items()}

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            prediction = output[0]
            if saving[0]:
                return (torch.cat([prediction, prediction]), *output[1:])
            if pipe.do_classifier_free_guidance:
                self.saw(*prediction.chunk(2))
            return None

        handles = [
            pipe.unet.register_forward_pre_hook(before, with_kwargs=True),
            pipe.unet.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            yield pipe
        finally:
            for handle in handles:
                handle.remove()


class GuidanceInterval(PartialGuidance):
    """CFG where ``low <= timestep < high`` alone.

    Raises:
        ValueError: an empty interval.
    """

    def __init__(self, low: float, high: float) -> None:
        if not low < high:
            raise ValueError(f"no timestep lies in [{low:g}, {high:g})")
        self.low, self.high = low, high

    def needed(self, timestep: float) -> bool:
        return self.low <= timestep < self.high


class AdaptiveGuidance(PartialGuidance):
    """CFG until the two predictions agree, on average over the batch.

    Args:
        threshold: cosine in (0, 1] above which they do.
    """

    def __init__(self, threshold: float) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"the threshold must be above 0 and at most 1, not {threshold:g}")
        self.threshold, self.agreed = threshold, False

    def begin(self) -> None:
        self.agreed = False

    def needed(self, timestep: float) -> bool:
        return not self.agreed

    def saw(self, unconditional: torch.Tensor, conditional: torch.Tensor) -> None:
        cosine = F.cosine_similarity(unconditional.flatten(1), conditional.flatten(1))
        self.agreed = bool(cosine.mean() > self.threshold)


def _second(value: Any, n: int) -> Any:
    """The prompt's half of whatever has one row for each sample of a doubled batch."""
    if isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == n:
        return value[n // 2 :]
    if isinstance(value, list | tuple):
        return type(value)(_second(v, n) for v in value)
    if isinstance(value, dict):
        return {k: _second(v, n) for k, v in value.items()}
    return value
