"""The protocol of a denoiser family. All that is specific to a family lies in one file.

A :class:`Backbone` wraps a denoiser of diffusers and says how it is called, which of its modules
a guide may touch, and by its base class :class:`~pilotfish.backbones.pipeline.FamilyPipeline` how
its pipelines encode text, run classifier-free guidance and turn latents into images. A new family
is one file with a subclass, and its line in :mod:`pilotfish.backbones`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from pilotfish.backbones.compiled import uncompiled
from pilotfish.backbones.context import DenoiserCall, GuidedPass, current_pass
from pilotfish.backbones.degraded import degraded
from pilotfish.backbones.doubling import twice_arguments
from pilotfish.backbones.hooks import Hooks, first_output, with_arguments, with_first
from pilotfish.backbones.pipeline import FamilyPipeline
from pilotfish.interface import GuideError, GuideProtocol, Refresh, TextConditions

T = TypeVar("T")


def plain(module: nn.Module) -> Any:
    """The layer itself, where a LoRA has wrapped it."""
    return getattr(module, "base_layer", module)


class Backbone(FamilyPipeline):
    """A denoiser of one family. See the module.

    Args:
        denoiser: a module of one of the family's classes.
    """

    family: ClassVar[str]
    """Name of the family in a guide's signature."""
    version: ClassVar[int] = 1
    """Version of the family's signature. Raised when its form changes."""
    denoisers: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of diffusers that belong to the family."""
    component: ClassVar[str] = "transformer"
    """Name of the denoiser among the components of its pipelines."""
    further_components: ClassVar[tuple[str, ...]] = ()
    """Names of further denoisers of its pipelines, for a part of the steps."""
    parameters: ClassVar[tuple[str, ...]]
    """Names of the positional parameters of the denoiser's forward."""
    text_is_projected: ClassVar[bool] = False
    """Whether the text is extrapolated inside the denoiser, after a projection that is not
    linear."""
    sign: ClassVar[int] = 1
    """-1 where the denoiser's output is the negative of the noise path's prediction."""
    takes_sigma: ClassVar[bool] = False
    """Whether the denoiser is given the noise level of flow matching, sigma, in place of the
    scheduler's timestep; 1 - sigma where :attr:`sign` is -1."""
    has_variance: bool = False
    """Whether the second half of the prediction's channels is a variance."""
    joint_attention_forms: ClassVar[tuple[str, ...]] = ("whole", "sampled")
    """The forms of :attr:`pilotfish.guides.Guide.joint_attention` that it knows; without joint
    attention they are the same."""
    negative_stream_forms: ClassVar[tuple[str, ...]] = ("joint", "cached")
    """Those of :attr:`pilotfish.guides.Guide.negative_stream`, likewise."""
    registry: ClassVar[list[type[Backbone]]] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "denoisers" in vars(cls):
            Backbone.registry.append(cls)

    def __init__(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    def made_of(self, name: str, tensors: Sequence[torch.Tensor], make: Callable[[], T]) -> T:
        """See :meth:`~pilotfish.backbones.cache.CallCache.same`, of the running call."""
        guided = GuidedPass.current()
        return make() if guided is None else guided.cache.same(name, tensors, make)

    @staticmethod
    def of_family(name: str) -> type[Backbone]:
        """The backbone of a family's name, as guides have it in their signature.

        Raises:
            GuideError: there is none of that name.
        """
        found = {family.family: family for family in Backbone.registry}
        if name not in found:
            raise GuideError(f"no family of denoisers is called {name}; known: {', '.join(found)}")
        return found[name]

    @staticmethod
    def of(denoiser: Any) -> Backbone:
        """The backbone of a denoiser, compiled or not.

        Raises:
            GuideError: no family here knows the denoiser; where it takes the guidance scale as an
                input, as FLUX.1-dev does, that is the reason that is given.
        """
        denoiser = uncompiled(denoiser)
        for family in Backbone.registry:
            if isinstance(denoiser, family.denoisers):
                return family(denoiser)
        if getattr(getattr(denoiser, "config", None), "guidance_embeds", False):
            raise GuideError(
                f"{type(denoiser).__name__} takes in the guidance scale and needs no second pass"
            )
        known = ", ".join(c.__name__ for family in Backbone.registry for c in family.denoisers)
        raise GuideError(
            f"{type(denoiser).__name__} belongs to no family that takes a guide; known: {known}"
        )

    @staticmethod
    def of_pipeline(pipe: Any) -> Backbone:
        """The backbone of a pipeline's denoiser.

        Raises:
            GuideError: the pipeline has none, or of a family that takes no guide.
        """
        for name in ("unet", "transformer"):
            if getattr(pipe, name, None) is not None:
                return Backbone.of(getattr(pipe, name))
        raise GuideError(f"{type(pipe).__name__} has neither a unet nor a transformer")

    @staticmethod
    def all_of_pipeline(pipe: Any) -> dict[str, Backbone]:
        """The backbones of a pipeline's denoisers, by the names of its components: some pipelines
        go on with a second denoiser at low noise.

        Raises:
            GuideError: as :meth:`of_pipeline`.
        """
        found = {(first := Backbone.of_pipeline(pipe)).component: first}
        for name in first.further_components:
            denoiser = getattr(pipe, name, None)
            if denoiser is not None and denoiser is not getattr(pipe, first.component):
                found[name] = Backbone.of(denoiser)
        return found

    # -- what a guide may touch -----------------------------------------------------------

    def signature(self, prediction_type: str) -> dict[str, Any]:
        """What must agree for a guide to fit, in plain JSON: what the denoiser predicts, and every
        site by name and width, listed from the denoiser's own modules.

        - ``attention``: [name, heads] of the attention layers that can be extrapolated, in running
          order;
        - ``modulation``: names of the layers that take in pooled text and can be extrapolated;
        - ``layers``: [name, channels] of the modules that a guide adds to along the decoder;
        - ``head``: the last module, its ``features``, and the ``channels`` of prediction and
          latents on its grid;
        - ``text_dim``: width of the text's embeddings.
        """
        return {
            "family": self.family,
            "version": self.version,
            "prediction_type": prediction_type,
            **self.sites(),
        }

    @abstractmethod
    def sites(self) -> dict[str, Any]:
        """The sites of :meth:`signature`."""

    @abstractmethod
    def place(self, hooks: Hooks) -> None:
        """Place the hooks for ``hooks.guide``."""

    def place_residuals(self, hooks: Hooks) -> None:
        """Add the guide's residuals after its target modules."""

        def residual(name: str) -> Callable[..., Any]:
            def after(guided: GuidedPass, module: Any, args: Any, output: Any) -> Any:
                if not (guided.active or guided.doubled):
                    return None
                made = self.image_map(guided, name, output)
                entered = self.image_map(guided, "", args[0]) if args else made
                if guided.doubled:
                    worse = guided.degraded
                    worse = None if worse is None else self.prediction_map(guided, worse)
                    changed = guided.corrected(name, entered, made, worse)
                    if changed is None:
                        return None
                else:
                    changed = guided.residual(name, entered, made)
                return self.with_image_map(guided, name, output, changed)

            return after

        last = self.sites()["head"]["module"]
        for name in hooks.guide.target_modules:
            hooks.after(hooks.modules[name], residual(name), doubled=name == last)

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        """The image in the output of a target module as a map (N, channels, h, w)."""
        return first_output(output)

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        """The output of a target module with another map for the image."""
        return with_first(output, made)

    def prediction_map(self, guided: GuidedPass, prediction: torch.Tensor) -> torch.Tensor:
        """The denoiser's prediction on the grid of :class:`~pilotfish.interface.GuideInputs`."""
        return self.on_grid(prediction)

    def install(self, guide: GuideProtocol) -> Hooks:
        """Put a guide's hooks on the denoiser, for training and for inference alike.

        Raises:
            GuideError: the denoiser lacks a module that the guide names, or has one that cannot
                be extrapolated; or the guide's joint attention is not implemented for it. No hook
                is left behind.
        """
        for name in ("joint_attention", "negative_stream"):
            form, known = getattr(guide, name), getattr(self, f"{name}_forms")
            if form not in known:
                raise GuideError(
                    f"this guide has {name}={form!r}, which is not implemented for "
                    f"{type(self.denoiser).__name__}: train with --{name} {known[0]}"
                )
        hooks = Hooks(guide, self.denoiser)
        named = (*guide.target_modules, *guide.extrapolated)
        hooks.modules = self.find_modules(named, hooks.modules)
        try:
            hooks.around(self.denoiser, self._begin, self._end)
            self.place(hooks)
        except BaseException:
            hooks.remove()
            raise
        return hooks

    def find_modules(self, named: Sequence[str], modules: dict[str, Any]) -> dict[str, Any]:
        """The denoiser's modules by the names that a guide has for them.

        Args:
            named: the names in a guide.
            modules: all modules by their names in the denoiser.

        Raises:
            GuideError: the denoiser lacks a module that the guide names.
        """
        if unknown := [name for name in named if name not in modules]:
            raise GuideError(f"this denoiser has no {unknown[0]}, to which the guide adds")
        return modules

    def _begin(self, guided: GuidedPass, module: Any, args: Any, kwargs: Any) -> Any:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        guided.begin(self.read_call(given), self)
        if guided.doubled:
            guided.degraded = self._degraded(guided, module, args, kwargs)
            changed = self.doubled(guided, given)
            if guided.guidance.replaces_second:
                return None
            return with_arguments(args, kwargs, self.parameters, changed)
        if not guided.active:
            return None
        return with_arguments(args, kwargs, self.parameters, self.changed(guided, given))

    def _end(self, guided: GuidedPass, module: Any, args: Any, output: Any) -> Any:
        if guided.doubled:
            return with_first(output, self._combined(guided, *guided.pair(output[0])))
        if guided.active:
            guided.end(output[0])
        return None

    def _combined(
        self, guided: GuidedPass, unconditional: torch.Tensor, conditional: torch.Tensor
    ) -> torch.Tensor:
        """Of a call with both passes, the prediction of the guidance that the guide was taught."""
        guidance, worse = guided.guidance, guided.degraded
        rest = conditional[:, :0]
        if self.has_variance:
            n = conditional.shape[1] // 2
            rest, unconditional, conditional = (
                conditional[:, n:], unconditional[:, :n], conditional[:, :n]
            )  # fmt: skip
            worse = None if worse is None else worse[:, :n]
        if guided.refreshing:
            unconditional = guidance.second(unconditional, conditional, worse)
        scale = guided.refreshed(
            *(self.prediction_map(guided, x) for x in (unconditional, conditional))
        )
        if scale is not None:
            conditional = guidance.combine(
                unconditional, conditional, scale, self.guidance_rule
            )  # fmt: skip
        return torch.cat([conditional, rest], 1) if self.has_variance else conditional

    def _degraded(
        self, guided: GuidedPass, module: Any, args: Any, kwargs: Any
    ) -> torch.Tensor | None:
        """The prediction of a degraded denoiser in a call with both passes, where the guide was
        taught a guidance that has one."""
        guide = guided.guide
        if not guided.guidance.degrades:
            return None
        if guided.guidance.replaces_second and guided.guidance.weak_prompt == "negative":
            assert guided.call is not None
            n, given = len(guided.call.latents), dict(zip(self.parameters, args, strict=False))
            text = guided.negative.expand(n).to(guided.call.text.dtype)
            changed = self.text_arguments(text, given | kwargs)
            args, kwargs = with_arguments(args, kwargs, self.parameters, changed)
        with (
            current_pass(None),
            degraded(self.denoiser, guided.guidance, guide.weak_denoiser) as denoiser,
        ):
            made = denoiser(*args, **kwargs)[0]
        return made if isinstance(made, torch.Tensor) else torch.stack(list(made))

    # -- how the denoiser is called -------------------------------------------------------

    @abstractmethod
    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        """The meaning of a call's arguments, by their names."""

    def changed(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments that the guide changes, by name."""
        text = given["encoder_hidden_states"]
        text = text if self.text_is_projected else guided.extrapolated_text(text)
        return {"encoder_hidden_states": guided.added_text(text)}

    def doubled(self, guided: GuidedPass, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call with both passes, by name: every batch twice, the first time with
        the negative prompts."""
        assert guided.call is not None
        n, text = len(guided.call.latents), guided.call.text
        repeated = twice_arguments(given, n)
        both = TextConditions.cat([guided.negative.expand(n).to(text.dtype), text])
        return repeated | self.text_arguments(both, repeated)

    @abstractmethod
    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call that hold the prompts, by name.

        Args:
            given: the other arguments, of the same batch size.
        """

    @abstractmethod
    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents or a prediction, (N, C, H, W), on the grid of
        :class:`~pilotfish.interface.GuideInputs`. Further channels, such as a mask or a variance,
        are left out."""

    def refresh_on_grid(self, refresh: Refresh) -> Refresh:
        """What a refresh found, from predictions (N, C, H, W) of the noise path to the denoiser's
        own on the grid of :class:`~pilotfish.interface.GuideInputs`."""
        found = refresh.map(self.on_grid)
        if self.sign > 0:
            return found
        return replace(
            found, difference=-found.difference, conditional=-found.conditional, slope=-found.slope
        )

    @abstractmethod
    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        """The denoiser's prediction, (N, C, h, w).

        Args:
            latents: (N, C, h, w).
            time: (N,) normalised.
            text: N prompts.
            sizes: from :meth:`sizes`.
        """

    num_train_timesteps: int = 1000
    """Timesteps of the denoiser at time 1."""

    def schedule_time(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Normalised time of a scheduler's timesteps."""
        return timesteps.float() / self.num_train_timesteps

    def time(self, timestep: torch.Tensor) -> torch.Tensor:
        """Normalised time of the timesteps that the denoiser is given."""
        if not self.takes_sigma:
            return self.schedule_time(timestep)
        return timestep.float() if self.sign > 0 else 1 - timestep.float()

    def timestep(self, time: torch.Tensor) -> torch.Tensor:
        """Timesteps of normalised times, as the denoiser is given them."""
        if not self.takes_sigma:
            return time * self.num_train_timesteps
        return time if self.sign > 0 else 1 - time
