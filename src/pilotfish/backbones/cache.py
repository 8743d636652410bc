"""What a guided pass computes once for many denoiser calls of a pipeline's call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pilotfish.interface import Refresh, TextConditions

T = TypeVar("T")
TABLE_BYTES = 2**28
"""Largest table of values at the steps of a schedule. It has as many steps as fit; where one does
not, they are computed at each step."""
TABLES = 2
"""Tables of a whole schedule that one call makes. A callback at every step makes each useless
after one step; from then on modulations are computed at the step."""


@dataclass
class ScheduleTable:
    """Values at every step of a schedule, and what they were made of.

    Attributes:
        schedule: (T,) timesteps.
        scale: w.
        text: the prompts.
        n: their number.
        times: (T, 1) normalised times.
        w: (N,) the scale.
        place: the present step.
        values: what the denoiser's own layers make of time and negative prompt, by its key: one
            tuple of tensors by the place of its step; None where that may not be kept.
        modulations: the guide's, from step ``first`` on; None where they are computed at each step.
        refresh: the one that they were made with.
    """

    schedule: torch.Tensor
    scale: float
    text: TextConditions
    n: int
    times: torch.Tensor
    w: torch.Tensor
    place: int = 0
    values: dict[Any, Any] = field(default_factory=dict)
    modulations: list[Any] | None = None
    first: int = 0
    refresh: Refresh | None = None

    def holds(self, schedule: torch.Tensor, scale: float, text: TextConditions, n: int) -> bool:
        """Whether it was made of these."""
        same = schedule is self.schedule and scale == self.scale and n == self.n
        mine = self.text
        return same and all(
            getattr(text, name) is getattr(mine, name) for name in ("embeds", "pooled", "mask")
        )

    def modulations_at_step(self, refresh: Refresh | None) -> Any:
        """Those of the present step; None where they are of another refresh or of other steps."""
        if self.modulations is None or refresh is not self.refresh:
            return None
        number = self.place - self.first
        return self.modulations[number] if 0 <= number < len(self.modulations) else None


class CallCache:
    """Values that stay the same for the rest of a call, or for every step of its schedule."""

    def __init__(self) -> None:
        self._made: dict[nn.Module, Any] = {}
        self._of_tensor: tuple[torch.Tensor, Any] | None = None
        self._of_tensors: dict[str, tuple[tuple[torch.Tensor, ...], Any]] = {}
        self._table: ScheduleTable | None = None
        self._in_schedule = False
        self._tables = 0

    def clear(self) -> None:
        """Forget all values but those of :meth:`same`, after the negative prompts or the denoiser
        have changed."""
        self._made, self._of_tensor, self._table = {}, None, None

    def made_of(self, tensor: torch.Tensor, make: Callable[[], T]) -> T:
        """A value made of a tensor, made anew where it is another tensor than before."""
        kept = self._of_tensor
        if kept is None or kept[0] is not tensor:
            kept = tensor, make()
            if not torch.compiler.is_compiling():
                self._of_tensor = kept
        made: T = kept[1]
        return made

    def same(self, name: str, tensors: Sequence[torch.Tensor], make: Callable[[], T]) -> T:
        """A value made of tensors, the same object as long as they are the same objects: what the
        denoiser makes of the texts is kept over a call where these are."""
        given, made = self._of_tensors.get(name, ((), None))
        if not given or [*map(id, given)] != [*map(id, tensors)]:
            self._of_tensors[name] = tuple(tensors), (made := make())
        value: T = made
        return value

    def made_by(
        self, module: nn.Module, make: Callable[[], T], parts: Iterable[nn.Module] = ()
    ) -> T:
        """A value made of the negative prompt by ``parts`` of a module, made once a call where it
        is sure to stay.

        It is not cached while gradients are computed, nor where an adapter may be turned up or
        down between two steps or a part was patched. Inside a compiled graph the value is
        computed again; passing it in would need a second graph.
        """
        if not _lasting(parts):
            return make()
        if module not in self._made:
            self._made[module] = make()
        made: T = self._made[module]
        return made

    def at_step(
        self, key: Any, make: Callable[[torch.Tensor], Sequence[torch.Tensor]],
        parts: Callable[[], Iterable[nn.Module]], size: Callable[[], int] = lambda: 0,
    ) -> tuple[torch.Tensor, ...] | None:  # fmt: skip
        """Values made of time and the negative prompt by ``parts`` of the denoiser, at this step;
        made for the whole schedule at its first step, or for as many steps as :data:`TABLE_BYTES`
        allows. None where the schedule is not known, :meth:`made_by` would not cache, one step is
        too large, or the parts are still on another device, from which an offloaded denoiser moves
        when it is called.

        Args:
            make: (T,) timesteps -> (T, ...) each.
            size: their bytes at one step.
        """
        # a graph that reads the step is compiled for it alone
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        table = self._table
        if table is None or not self._in_schedule:
            return None
        steps, device = table.values.get(key, {}), table.times.device
        if steps is not None and table.place not in steps:
            used = list(parts())
            if any(p.device != device for part in used for p in part.parameters(recurse=False)):
                return None
            fit = 0
            if _lasting(used):
                total, bytes_each = len(table.times), size()
                fit = min(total, TABLE_BYTES // bytes_each) if bytes_each else total
            steps = None
            if fit:
                # the same steps together wherever a call begins: their number decides rounding
                first = table.place // fit * fit
                made = make(table.schedule[first : first + fit].to(device))
                steps = dict(enumerate(zip(*(x.unbind() for x in made), strict=True), first))
            table.values[key] = steps
        found: tuple[torch.Tensor, ...] | None = None if steps is None else steps[table.place]
        return found

    @property
    def one_time(self) -> bool:
        """Whether all samples of the running denoiser call are known to be at one time."""
        return self._in_schedule

    def find_table(
        self, schedule: torch.Tensor | None, place: int | None, scale: float | torch.Tensor,
        text: TextConditions, n: int, to_time: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> ScheduleTable | None:  # fmt: skip
        """The table of a schedule, at this place; a new one where scale, prompts or their number
        have changed. None where the place is not known, or too many were made."""
        self._in_schedule = place is not None
        if schedule is None or place is None:
            return None
        table, scale = self._table, float(scale)
        if table is None or not table.holds(schedule, scale, text, n):
            self._table = None
            if self._tables == TABLES:
                return None
            self._tables += 1
            w = torch.full((n,), scale, device=device)
            times = to_time(schedule.to(device))[:, None]
            table = self._table = ScheduleTable(schedule, scale, text, n, times, w)
        table.place = place
        return table


def _lasting(parts: Iterable[nn.Module]) -> bool:
    """Whether what parts of the denoiser make stays the same for the rest of a call."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return not any(isinstance(part, BaseTunerLayer) or _patched(part) for part in parts)


def _patched(module: nn.Module) -> bool:
    """Whether a module has hooks of others, or another ``forward`` than that of its class."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    others = any(not getattr(hook, "of_guide", False) for hook in hooks)
    return others or "forward" in vars(module)


def step_of(timestep: torch.Tensor, schedule: torch.Tensor) -> int | None:
    """Which step of a schedule a timestep is: pipelines hand out views into the schedule's own
    memory, so a view's offset tells without waiting for the device. None for any other tensor."""
    if timestep.untyped_storage().data_ptr() != schedule.untyped_storage().data_ptr():
        return None
    place = int(timestep.storage_offset() - schedule.storage_offset())
    single = timestep.numel() == 1 or set(timestep.stride()) == {0}
    dense = schedule.stride() == (1,) and schedule.dtype == timestep.dtype
    return place if single and dense and 0 <= place < len(schedule) else None
