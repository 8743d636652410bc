"""One sampling of a guided model in ComfyUI.

A sampling asks for the predictions of prompt and negative prompt at each step. With a guide the
denoiser runs once, for the prompt, and its guided prediction is returned for both: the CFG formula
then gives it for every scale. In a step that refreshes, ComfyUI runs both passes as without a
guide, and what they predicted is kept for the guide.

Hooks are placed when a sampling begins and removed when it ends, and nothing of a guide is left on
the model, which ComfyUI shares between the branches of a workflow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pilotfish.backbones import GuidedPass, current_pass
from pilotfish.guides.base import Guide
from pilotfish.interface import GuideError, GuideInputs, Refresh, TextConditions
from pilotfish.refresh import RefreshSteps, new_refresh, places

from . import conditions
from .fitting import KEY, check, check_guider, check_patches, logger, warn_of_patches

Conditioning = Sequence[dict[str, Any]]


class GuidedSampling:
    """See the module.

    Args:
        guide: on the model's device.
        guider: the ``CFGGuider`` that samples; w is its ``cfg``.
        sigmas: (steps + 1,) the noise levels.
        refresh: how many steps run both passes, or what ratio of them.

    Raises:
        GuideError: the model or the guider takes no such guide.
    """

    def __init__(
        self, guide: Guide, guider: Any, sigmas: torch.Tensor, refresh: RefreshSteps
    ) -> None:
        check_guider(guider)
        model = guider.inner_model
        self.guide, self.guider, self.model = guide, guider, model
        self.backbone = check(guide, model, model.model_sampling)
        self.sigmas = sigmas.tolist()
        steps = len(self.sigmas) - 1
        self.due = set(places(refresh, steps, few_steps=guide.times is not None))
        if self.due and guide.guidance.guidance != "cfg":
            raise GuideError(
                f"this guide was taught {guide.guidance.title}, and a refresh in ComfyUI is CFG: "
                "set refresh to 0"
            )
        self._negative = TextConditions(torch.empty(0))
        self._prompts: list[torch.Tensor | None] = []
        self.guided = GuidedPass(guide, lambda: float(guider.cfg), lambda: self._negative)
        self._warn_of_range()

    def _warn_of_range(self) -> None:
        low, high = self.guide.guidance_scale_range
        if not low <= self.guider.cfg <= high:
            logger.warning(
                "cfg %g lies outside [%g, %g], where this guide was trained",
                self.guider.cfg, low, high,
            )  # fmt: skip
        times = self.guide.times
        if times is None:
            return
        levels = torch.tensor(self.sigmas[:-1], device=self.guide.device)
        taken = (self.model.model_sampling.timestep(levels).float() / 1000).tolist()
        if len(taken) != len(times) or any(
            abs(a - b) > 2e-3 for a, b in zip(taken, times, strict=True)
        ):
            logger.warning(
                "this guide was distilled for %d steps at the times %s, and the sampler takes %d "
                "at %s; use the scheduler sgm_uniform with euler or ddim",
                len(times), times, len(taken), [round(t, 3) for t in taken],
            )  # fmt: skip

    @contextmanager
    def open(self) -> Iterator[GuidedSampling]:
        """Place the hooks for the length of a block. Outside of :meth:`predict` they do nothing."""
        hooks = self.backbone.install(self.guide)
        self.guided.hooks = hooks
        try:
            with self.guided.open(), current_pass(None):
                yield self
        finally:
            hooks.remove()

    def predict(
        self, executor: Any, model: Any, conds: list[Conditioning], x: torch.Tensor,
        timestep: torch.Tensor, options: dict[str, Any],
    ) -> list[torch.Tensor]:  # fmt: skip
        """The denoised latents for prompt and negative prompt, (N, C, h, w) each.

        Args:
            executor: runs the denoiser for a list of conditionings.
            conds: the conditionings of prompt and negative prompt.
            x: (N, C, h, w) the latents.
            timestep: (N,) the noise level.

        Raises:
            GuideError: the conditionings, or patches of other nodes, do not go with a guide.
        """
        sigma = float(timestep[0])
        positive, negative = (conditions.active(entries, sigma) for entries in conds)
        if self.guider.cfg <= 1 or not positive or not negative:
            plain: list[torch.Tensor] = executor(model, conds, x, timestep, options)
            return plain
        check_patches(options)
        conditions.check(positive, negative)
        positive = self._take_texts(positive, negative[0], x)
        step = min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - sigma))
        if step in self.due:
            self.due.remove(step)  # solvers may call the denoiser several times in a step
            conditions.check_refresh(positive, negative)
            return self._refresh(executor, model, conds, x, timestep, options)
        with current_pass(self.guided):
            made = executor(model, [positive, None], x, timestep, options)[0]
        return [made, made]

    def _take_texts(
        self, positive: Conditioning, negative: dict[str, Any], x: torch.Tensor
    ) -> list[dict[str, Any]]:
        """Keep the negative prompt, and bring both to one length."""
        repeats = self.backbone.repeats_text
        length = conditions.common_length([*positive, negative]) if repeats else None
        prompts = [
            tensor
            for entry in (negative, *positive)
            for tensor in (conditions.embeds(entry), conditions.vector(entry))
        ]
        if len(prompts) != len(self._prompts) or any(
            a is not b for a, b in zip(prompts, self._prompts, strict=True)
        ):
            self._prompts = prompts
            self.guided.forget_refresh()  # the difference is that of other prompts
            text, y = prompts[:2]
            assert text is not None
            embeds = text if length is None else conditions.repeated(text, length)
            self._negative = self.backbone.text(
                embeds.to(x.device), None if y is None else y.to(x.device)
            ).one_if_equal()
        if length is None:
            return list(positive)
        return [conditions.with_length(entry, length) for entry in positive]

    # -- steps with both passes -----------------------------------------------------------------

    def _refresh(
        self, executor: Any, model: Any, conds: list[Conditioning], x: torch.Tensor,
        timestep: torch.Tensor, options: dict[str, Any],
    ) -> list[torch.Tensor]:  # fmt: skip
        with self._record() as found:
            made: list[torch.Tensor] = executor(model, conds, x, timestep, options)
        prompt, negative = found[0], found[1]
        to = self.guide.dtype
        grid, n = self.backbone.on_grid, len(x)
        conditional, unconditional = (grid(p["output"]).to(to) for p in (prompt, negative))
        latents = grid(prompt["x"]).to(to)
        time = self.backbone.time(prompt["timesteps"]).reshape(-1).expand(n).contiguous()
        before = self.guided.refresh
        if before is None or before.latents.shape != latents.shape:
            before = Refresh.unknown(latents, time)
        self.guided.refresh = new_refresh(
            (conditional - unconditional).contiguous(), conditional, latents, time, before
        )
        if not self.guide.corrects_refresh:
            return made
        corrected = self._corrected(prompt, conditional, latents, time)
        guided = self.backbone.off_grid(corrected, prompt["x"])
        denoised = self.model.model_sampling.calculate_denoised(timestep, guided.float(), x)
        return [denoised, denoised]

    def _corrected(
        self, prompt: dict[str, torch.Tensor], conditional: torch.Tensor, latents: torch.Tensor,
        time: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The prediction of a guide for few steps, on the grid: it adds to that of CFG as well."""
        to, n = self.guide.dtype, len(latents)
        inputs = GuideInputs(
            latents, time, torch.full((n,), float(self.guider.cfg), device=latents.device),
            self.backbone.text(prompt["context"], prompt.get("y")).to(to), self._negative.to(to),
            refresh=self.guided.refresh,
        )  # fmt: skip
        features = self.backbone.head_map(prompt["features"].to(to), latents)
        return self.guide(inputs).residuals[self.backbone.head](features, conditional)

    @contextmanager
    def _record(self) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
        """What the denoiser is given and predicts in a block, for prompt (0) and negative prompt
        (1). ComfyUI runs both in one call or, short of memory, in two."""
        found: dict[int, dict[str, torch.Tensor]] = {}
        features: list[torch.Tensor] = []

        def enter(module: Any, args: Any) -> None:
            features[:] = [args[0]]

        def leave(module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            given = {**dict(zip(self.backbone.parameters, args, strict=False)), **kwargs}
            which = given["transformer_options"]["cond_or_uncond"]
            names = ("x", "timesteps", "context", "y")
            given = {k: given[k] for k in names if given.get(k) is not None}
            given |= {"output": output, "features": features[0]}
            for i, part in enumerate(which):
                found[part] = {k: v.chunk(len(which))[i] for k, v in given.items()}

        head = self.backbone.module(self.backbone.head)
        net = self.backbone.denoiser
        handles = [
            head.register_forward_pre_hook(enter),
            net.register_forward_hook(leave, with_kwargs=True),
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
        if set(found) != {0, 1}:
            raise GuideError("the denoiser did not run both passes in a step that refreshes")


class SamplerWrapper:
    """Around a sampler: opens a :class:`GuidedSampling`.

    Args:
        weights: the ``ModelPatcher`` of a :class:`~.loading.GuideModule`.
        refresh: None for the guide's own ratio.
    """

    def __init__(self, weights: Any, refresh: RefreshSteps | None) -> None:
        self.weights, self.refresh = weights, refresh

    def __call__(
        self, executor: Any, guider: Any, sigmas: torch.Tensor, extra_args: dict[str, Any],
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        check_guider(guider)
        if guider.cfg > 1:
            options, patcher = extra_args["model_options"], guider.model_patcher
            check_patches(options, patcher.wrappers)
            warn_of_patches(options)
            guide = self.weights.model.guide
            guide.to(patcher.load_device)  # ComfyUI leaves a part of it behind in low VRAM
            refresh = guide.refresh_ratio if self.refresh is None else self.refresh
            with GuidedSampling(guide, guider, sigmas, refresh).open() as sampling:
                options["transformer_options"][KEY] = sampling
                return executor(guider, sigmas, extra_args, *args, **kwargs)
        return executor(guider, sigmas, extra_args, *args, **kwargs)


def predict_conditions(
    executor: Any, model: Any, conds: list[Any], x: torch.Tensor, timestep: torch.Tensor,
    options: dict[str, Any],
) -> Any:  # fmt: skip
    """Around the denoiser's passes of one step.

    Raises:
        GuideError: it is a further pass of a patch, such as one with perturbed attention.
    """
    sampling = options.get("transformer_options", {}).get(KEY)
    if sampling is not None and len(conds) != 2:
        raise GuideError(
            "a patch makes a further pass (PAG, skip-layer guidance or another), and a guide makes "
            "none; remove it or Apply guide"
        )
    if sampling is None or any(entries is None for entries in conds):
        return executor(model, conds, x, timestep, options)
    return sampling.predict(executor, model, conds, x, timestep, options)
