"""What the families of transformers have in common: blocks of one width, in which the tokens of an
image are all tokens or some of them.

A family states where its layers are. Where its attention joins the tokens of text and image, see
:mod:`pilotfish.backbones.joined_transformer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.doubling import without_mask
from pilotfish.backbones.tokens import patchify, to_map, to_tokens
from pilotfish.interface import TextConditions


class TransformerBackbone(Backbone):
    """A transformer whose blocks are of one width. See the module."""

    stacks: ClassVar[tuple[str, ...]] = ("transformer_blocks",)
    """The names of the lists of blocks, in running order."""
    attention_layer: ClassVar[str] = "attn"
    """The name, within a block, of the attention layer that takes in the text."""
    text_layer: ClassVar[str] = "context_embedder"
    """The name of the linear layer that the text passes first."""
    mask_argument: ClassVar[str | None] = None
    """The argument of the denoiser that is the text's mask; None where it takes none."""
    image_output: ClassVar[int] = 1
    """The place of the image in the output of a block that returns image and text apart."""

    @property
    def last_layer(self) -> str:
        """The name of the last layer."""
        return "proj_out"

    @property
    def patch(self) -> int:
        """Pixels of a token, each way, in latents that are not packed."""
        return int(self.denoiser.config.patch_size)

    def blocks(self) -> dict[str, Any]:
        """All blocks by name, in running order."""
        net = self.denoiser
        return {f"{name}.{i}": b for name in self.stacks for i, b in enumerate(getattr(net, name))}

    def sites(self) -> dict[str, Any]:
        net, blocks, layer = self.denoiser, self.blocks(), self.attention_layer
        last = plain(net.get_submodule(self.last_layer))
        return {
            "text_dim": plain(net.get_submodule(self.text_layer)).in_features,
            "attention": [
                [f"{name}.{layer}", getattr(b, layer).heads] for name, b in blocks.items()
            ],
            "modulation": [],
            "layers": [[name, last.in_features] for name in blocks],
            "head": {
                "module": self.last_layer,
                "features": last.in_features,
                "channels": last.out_features // (2 if self.has_variance else 1),
            },
        }

    # -- the image among the tokens ---------------------------------------------------------

    def image_tokens(self, guided: GuidedPass) -> int:
        """The number of an image's tokens in a sequence, with those of reference images."""
        assert guided.call is not None
        return guided.call.latents.shape[-2:].numel()

    def image_start(self, guided: GuidedPass, tokens: torch.Tensor) -> int:
        """The place of the image's first token in a sequence (N, S, ...)."""
        return tokens.shape[1] - self.image_tokens(guided)

    def image_of(self, guided: GuidedPass, tokens: torch.Tensor) -> torch.Tensor:
        """The image's tokens (N, I, ...) in a sequence (N, S, ...)."""
        first = self.image_start(guided, tokens)
        return tokens[:, first : first + self.image_tokens(guided)]

    def with_image(
        self, guided: GuidedPass, tokens: torch.Tensor, made: torch.Tensor
    ) -> torch.Tensor:  # fmt: skip
        """A sequence (N, S, d) with other tokens for the image, (N, I, d), or its first ones."""
        if made.shape[1] == tokens.shape[1]:
            return made
        first = self.image_start(guided, tokens)
        rest = tokens[:, first + made.shape[1] :]
        return torch.cat([tokens[:, :first], made.to(tokens.dtype), rest], 1)

    def image_map(self, guided: GuidedPass, name: str, output: Any) -> torch.Tensor:
        assert guided.call is not None
        grid = guided.call.latents.shape[-2:]
        tokens = output if isinstance(output, torch.Tensor) else output[self.image_output]
        return to_map(self.image_of(guided, tokens)[:, : grid.numel()], grid)

    def with_image_map(self, guided: GuidedPass, name: str, output: Any, made: torch.Tensor) -> Any:
        if isinstance(output, torch.Tensor):
            return self.with_image(guided, output, to_tokens(made))
        streams = list(output)
        before = streams[self.image_output]
        streams[self.image_output] = self.with_image(guided, before, to_tokens(made))
        return tuple(streams)

    def prediction_map(self, guided: GuidedPass, prediction: torch.Tensor) -> torch.Tensor:
        if self.packing > 1:
            return self.image_map(guided, "", prediction)
        return super().prediction_map(guided, prediction)

    # -- calls ------------------------------------------------------------------------------

    def read_call(self, given: Mapping[str, Any]) -> DenoiserCall:
        mask = None if self.mask_argument is None else given.get(self.mask_argument)
        text = TextConditions(given["encoder_hidden_states"], mask=mask)
        return DenoiserCall(self.on_grid(given["hidden_states"]), given["timestep"], text)

    def on_grid(self, latents: torch.Tensor) -> torch.Tensor:
        return latents if self.packing > 1 else patchify(latents, self.patch)

    def text_arguments(self, text: TextConditions, given: Mapping[str, Any]) -> dict[str, Any]:
        if self.mask_argument is None:
            return {"encoder_hidden_states": without_mask(text)}
        return {"encoder_hidden_states": text.embeds, self.mask_argument: text.mask}

    def __call__(
        self, latents: torch.Tensor, time: torch.Tensor, text: TextConditions, sizes: Any = None
    ) -> torch.Tensor:
        if self.mask_argument is None:
            text = TextConditions(text.embeds, text.pooled)
        made: torch.Tensor = self.denoiser(
            hidden_states=latents, timestep=self.timestep(time), **self.text_arguments(text, {}),
            return_dict=False,
        )[0]  # fmt: skip
        return made if self.sign > 0 else -made


class KnownValues(ABC):
    """What the denoiser's own layers make of time and the negative prompts alone, made for all
    steps of a schedule at its first one. A subclass says what that is.

    Args:
        backbone: of the denoiser.
    """

    def __init__(self, backbone: TransformerBackbone) -> None:
        self.backbone = backbone

    def take(self, guided: GuidedPass) -> None:
        """Keep what is known for the time of the running call."""
        known = guided.cache.at_step(
            self, lambda timesteps: self._at_all(guided, timesteps), self.modules,
            lambda: self.size(guided),
        )  # fmt: skip
        if known is not None:
            self.keep(guided, known)

    def _at_all(self, guided: GuidedPass, timesteps: torch.Tensor) -> list[torch.Tensor]:
        """(T, N, ...) each, at the timesteps (T,) of a schedule."""
        assert guided.call is not None
        backbone, n = self.backbone, self.rows(guided)
        # in the precision in which the denoiser is given them
        timesteps = timesteps.to(torch.as_tensor(guided.call.timestep).dtype)
        times = backbone.timestep(backbone.schedule_time(timesteps)).repeat_interleave(n)
        return [x.unflatten(0, (-1, n)) for x in self.make(guided, times)]

    def rows(self, guided: GuidedPass) -> int:
        """How many rows the values have at one time: one for each negative prompt."""
        return len(guided.negative)

    @abstractmethod
    def make(self, guided: GuidedPass, times: torch.Tensor) -> list[torch.Tensor]:
        """The values, (T N, ...) each, at times (T N,) as the denoiser is given them; all N
        negative prompts at the first time come first."""

    @abstractmethod
    def keep(self, guided: GuidedPass, known: Sequence[torch.Tensor]) -> None:
        """Keep the values (N, ...) of one time for the hooks of the running call."""

    @abstractmethod
    def modules(self) -> Iterator[nn.Module]:
        """All modules that :meth:`make` uses, and those that hold them."""

    @abstractmethod
    def size(self, guided: GuidedPass) -> int:
        """The bytes of the values at one time."""
