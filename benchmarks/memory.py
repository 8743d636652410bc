"""The memory of sampling and training steps at full size, with random weights.

It is computed on any machine from the step itself, run on fake tensors, which have shapes and no
contents. It can also be measured where there is room for real tensors.

torch's own ``MemTracker`` cannot be used here: it hooks the gradients of all parameters, and those
of the base are frozen.
"""

from __future__ import annotations

import gc
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.training_utils import EMAModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.integers import KnownIntegers
from benchmarks.parts import TEXT_ENCODERS, VAES
from benchmarks.shapes import Shape
from benchmarks.step import SamplingStep, default_dtype
from pilotfish.evaluation.results import machine, versions
from pilotfish.guidance import classifier_free_guidance
from pilotfish.teacher import Student, checkpoint_in_pass

WEIGHTS = ("", "fp8", "nf4")
"""How the base's weights may be stored: in the precision of the activations, by diffusers'
layerwise casting, by bitsandbytes."""


@dataclass(frozen=True)
class TrainingMemory:
    """The memory of a training step.

    Attributes:
        parts: computed bytes by purpose; the peak where they come and go.
        sampling: computed peak of a sampling step of as many latents, by mode, with the weights
            of denoiser and guide.
        weights: one of ``WEIGHTS``.
        peak_bytes: measured, without text encoders and VAE; NaN if not measured.
        seconds: of the measured step.
        batch: latents at once.
        dtype: of the base's weights.
        command: the command line that repeats it.
    """

    parts: dict[str, float]
    peak_bytes: float
    seconds: float
    batch: int
    dtype: str
    command: str
    machine: str
    versions: dict[str, str]
    sampling: dict[str, float] = field(default_factory=dict)
    weights: str = ""

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the live tensors that operators create while it is active, each storage
    once, of real and of fake tensors.

    The garbage collector is off meanwhile. Its runs depend on how many objects the process has
    made before, and so would the peak.

    Attributes:
        current: bytes now.
        peak: bytes at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._storages: set[int] = set()
        self._collects = False

    def __enter__(self) -> Self:
        self._collects = gc.isenabled()
        gc.disable()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        if self._collects:
            gc.enable()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.current += size
            self.peak = max(self.peak, self.current)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.current -= size


def module_bytes(module: nn.Module) -> float:
    """Bytes of a module's parameters."""
    return float(sum(p.numel() * p.dtype.itemsize for p in module.parameters()))


def stored_bytes(shape: Shape, dtype: torch.dtype, weights: str) -> tuple[float, float]:
    """Bytes of a denoiser's parameters as they are stored, and of the largest layer that is
    converted to ``dtype`` when it runs; 0 where none is.

    Args:
        weights: one of ``WEIGHTS``. For ``nf4``, linear layers have four bits a number and a
            float32 factor for each 64 (arXiv 2305.14314, without double quantisation).
    """
    with torch.device("meta"), default_dtype(dtype):
        denoiser: Any = shape.denoiser(**shape.config)
    whole = module_bytes(denoiser)
    if weights == "fp8":
        denoiser.enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=dtype)
        changed = [
            sum(p.numel() for p in m.parameters(recurse=False) if p.dtype is torch.float8_e4m3fn)
            for m in denoiser.modules()
        ]
        return module_bytes(denoiser), float(max(changed) * dtype.itemsize)
    if weights == "nf4":
        linear = [m.weight.numel() for m in denoiser.modules() if isinstance(m, nn.Linear)]
        saved = sum(linear) * (dtype.itemsize - 0.5 - 4 / 64)
        return whole - saved, float(max(linear) * dtype.itemsize)
    return whole, 0.0


# -- sampling ---------------------------------------------------------------------------


def largest_batches(
    shape: Shape, dtype: torch.dtype, memory: float, reserved: float = 0.0
) -> dict[str, int]:
    """The largest batch that a device holds, by mode; 0 where not even one image fits.

    Args:
        shape: of the denoiser.
        dtype: of weights and activations.
        memory: bytes of the device.
        reserved: bytes of everything else on it, such as text encoders and VAE.
    """
    with FakeTensorMode(), TensorMemory() as tensors:
        step = SamplingStep(shape, torch.device("cpu"), dtype, known_schedule=False)
        left = memory - reserved
        return {m: largest(partial(_step_bytes, step, tensors, m), left) for m in step.modes}


def step_bytes(shape: Shape, dtype: torch.dtype, mode: str, batch: int) -> float:
    """Peak memory of a sampling step, with the weights of denoiser and guide."""
    return sampling_bytes(shape, dtype, batch)[mode]


def sampling_bytes(
    shape: Shape, dtype: torch.dtype, batch: int = 1, weights: str = ""
) -> dict[str, float]:
    """Peak memory of a sampling step of ``batch`` images, by mode, with the weights of denoiser and
    guide; those of the denoiser as :func:`stored_bytes` counts them."""
    stored, converted = stored_bytes(shape, dtype, weights)
    with FakeTensorMode(), TensorMemory() as tensors:
        step = SamplingStep(shape, torch.device("cpu"), dtype, known_schedule=False)
        added = stored + converted - module_bytes(step.denoiser)
        return {m: _step_bytes(step, tensors, m, batch) + added for m in step.modes}


def _step_bytes(step: SamplingStep, tensors: TensorMemory, mode: str, batch: int) -> float:
    tensors.peak = before = tensors.current
    step.run(mode, batch)
    guide = module_bytes(step.guides[mode]) if mode in step.guides else 0.0
    return module_bytes(step.denoiser) + guide + tensors.peak - before


def largest(needed: Callable[[int], float], memory: float) -> int:
    """The largest n for which ``needed(n)`` is at most ``memory``; 0 if 1 is too large.

    ``needed`` grows with n in nearly equal steps, so the search starts from a linear estimate.
    """
    one, two = needed(1), needed(2)
    n = max(0, int(1 + (memory - one) / max(two - one, 1.0)))
    while needed(n + 1) <= memory:
        n += 1
    while n and needed(n) > memory:
        n -= 1
    return n


# -- training ---------------------------------------------------------------------------


class TrainingStep:
    """One training step of a guide on its frozen base, as :mod:`pilotfish.training` runs it:
    teacher, student, backward pass and update.

    Args:
        shape: of the denoiser.
        guide_type: one that fits.
        dtype: of the base's weights; the guide is float32.
        batch: latents at once.
        checkpointing: gradient checkpointing of the base.
        size: (height, width) of the images in pixels; left out, the pipeline's default.
        settings: of the guide, other than the defaults.
    """

    def __init__(
        self, shape: Shape, guide_type: str, device: torch.device, dtype: torch.dtype, batch: int,
        checkpointing: bool = True, size: tuple[int, int] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.sampling = SamplingStep(
            shape, device, dtype, (guide_type,), torch.float32, size=size, settings=settings
        )
        if checkpointing:
            self.sampling.denoiser.enable_gradient_checkpointing(checkpoint_in_pass)
        self.guide = self.sampling.guides[guide_type]
        self.guide.requires_grad_(True).train()
        self.batch, self.device = batch, device

    def backward(self) -> None:
        """Everything up to the gradients."""
        sampling, n, device = self.sampling, self.batch, self.device
        z, t = torch.randn(n, *sampling.latents, device=device), torch.full((n,), 0.5)
        scale = torch.full((n,), 4.0, device=device)
        with KnownIntegers():
            with torch.no_grad():
                both = sampling.base(torch.cat([z, z]), t.repeat(2), sampling.prompts(2 * n))
                unconditional, conditional = both.float().chunk(2)
                target = classifier_free_guidance(unconditional, conditional, scale)
            student = Student(self.guide, sampling.denoiser, sampling.sizes)
            try:
                guided = student(z, t, sampling.prompts(n), sampling.prompts(1), scale)
                (guided.float() - target).pow(2).mean().backward()
            finally:
                student.hooks.remove()

    def prepare(self) -> None:
        """Create the optimizer with its moments and the moving average, as after a first step."""
        self.optimizer = torch.optim.AdamW(self.guide.parameters(), 1e-3, foreach=False)
        for parameter in self.guide.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average = EMAModel(self.guide.parameters(), foreach=False)

    def run(self) -> None:
        """The whole step."""
        self.backward()
        torch.nn.utils.clip_grad_norm_(self.guide.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.guide.parameters())


def training_parts(
    shape: Shape, guide_type: str, dtype: torch.dtype, batch: int, checkpointing: bool = True,
    fake: bool = True, size: tuple[int, int] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Bytes of a training step by purpose; the peak where they come and go.

    Args:
        fake: use fake tensors, which take neither memory nor arithmetic.
        size: see :class:`TrainingStep`, as of ``settings``.
    """
    mode = FakeTensorMode() if fake else nullcontext()
    with mode, TensorMemory() as tensors:
        step = TrainingStep(
            shape, guide_type, torch.device("cpu"), dtype, batch, checkpointing, size, settings
        )
        base, guide = (module_bytes(m) for m in (step.sampling.denoiser, step.guide))
        tensors.peak = before = tensors.current
        step.backward()
        activations = tensors.peak - before - guide  # the gradients are there until the end
    return {
        "denoiser": base, "guide": guide, "gradients": guide, "moments": 2 * guide,
        "average": guide, "activations": activations,
    }  # fmt: skip


def pipeline_parts(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of what else is on the device: text encoders in the base's precision, and a float32
    VAE for validation images."""
    with torch.device("meta"):
        texts = [network(config) for network, config in TEXT_ENCODERS[name]]
        vae = VAES[name]()
    numbers = sum(p.numel() for text in texts for p in text.parameters())
    return {"text encoders": float(numbers * dtype.itemsize), "vae": module_bytes(vae)}


def training_memory(
    name: str, shape: Shape, guide_type: str, *, command: str,
    dtype: torch.dtype = torch.bfloat16, batch: int = 1, measured: bool = False,
    device: str = "cpu", weights: str = "",
) -> TrainingMemory:  # fmt: skip
    """Compute the memory of a training step with gradient checkpointing, and measure it if asked.

    Args:
        name: of the shape, which determines the text encoders.
        guide_type: one that fits.
        command: the command line, for the result.
        dtype: of the base's weights, and of its activations.
        batch: latents at once.
        measured: run a real step; it needs the memory that it measures.
        weights: how the base's weights are stored, one of ``WEIGHTS``; others than the first are
            not measured.

    Raises:
        ValueError: another guide type, or weights that cannot be measured.
    """
    if guide_type not in shape.guides:
        raise ValueError(f"{name} takes {', '.join(shape.guides)}, not {guide_type}")
    if measured and weights:
        raise ValueError(f"{weights} weights are counted, not measured: add --count_only")
    parts = training_parts(shape, guide_type, dtype, batch) | pipeline_parts(name, dtype)
    parts["denoiser"], converted = stored_bytes(shape, dtype, weights)
    if converted:
        parts["layer in use"] = converted
    peak, seconds = float("nan"), float("nan")
    if measured:
        step = TrainingStep(shape, guide_type, torch.device(device), dtype, batch)
        step.prepare()
        start = time.perf_counter()
        peak = peak_bytes(step.run, torch.device(device))
        seconds = time.perf_counter() - start
    return TrainingMemory(
        parts, peak, seconds, batch, str(dtype).removeprefix("torch."), command, machine(),
        versions(), sampling_bytes(shape, dtype, batch, weights), weights,
    )  # fmt: skip


def peak_bytes(call: Callable[[], object], device: torch.device) -> float:
    """Peak memory during a call: of tensors on CUDA, of the process on Linux, NaN elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device))
    reset = Path("/proc/self/clear_refs")
    if sys.platform != "linux" or not reset.exists():
        call()
        return float("nan")
    try:
        reset.write_text("5")  # begin a new peak; see proc(5)
    except OSError:
        import resource  # Unix only

        call()
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
