"""What the families of transformers have in common: blocks of one width, in which the tokens of an
image are all tokens or some of them.

A family states where its layers are. Where its attention joins the tokens of text and image, it is
a :class:`JoinedTransformerBackbone` and states how such a block takes the negative prompt's stream.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from pilotfish.backbones.base import Backbone, plain
from pilotfish.backbones.context import DenoiserCall, GuidedPass
from pilotfish.backbones.doubling import without_mask
from pilotfish.backbones.extrapolation import up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joint_attention import joined_attention
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


class JoinedTransformerBackbone(TransformerBackbone):
    """A transformer in which the tokens of text and image attend to each other.

    The negative prompt's tokens are a stream beside the pass: in each block they take the text's
    layers (:meth:`attend`, :meth:`follow`), with the pass's own queries, keys and values of the
    image.
    """

    joint_attention_forms = ("whole",)
    negative_stream_forms = ("joint",)

    def place(self, hooks: Hooks) -> None:
        attention = up_to_last(
            [name for name, _ in self.sites()["attention"]], hooks.guide.extrapolated
        )
        self.place_text(hooks, attention[0] if attention else None)
        for name, following in zip(attention, [*attention[1:], None], strict=False):
            self.place_attention(hooks, name, following)
        self.place_residuals(hooks)

    def place_text(self, hooks: Hooks, first: str | None) -> None:
        """Begin the negative prompt's stream, ``scratch["stream", first]``, (N, L, d), when the
        prompts are embedded; and keep what :meth:`attend` reads of the pass.

        Args:
            first: the first attention layer; None where none is extrapolated.
        """
        if first is None:
            return

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            text = guided.cache.made_by(
                module, lambda: module.forward(guided.negative.embeds), [module]
            )
            guided.scratch["stream", first] = self.stream(text).expand(len(output), -1, -1)

        hooks.after(hooks.modules[self.text_layer], embedded)

    def stream(self, text: torch.Tensor) -> torch.Tensor:
        """The stream that enters the first block, of embedded prompts (N, L, d)."""
        return text

    def place_attention(self, hooks: Hooks, name: str, following: str | None) -> None:
        """Extrapolate one attention layer where the guide has a gain for it, and take the negative
        prompt's stream to the next."""
        layer, block = hooks.modules[name], hooks.modules[name.rpartition(".")[0]]

        def attend(
            guided: GuidedPass, stream: torch.Tensor, q: torch.Tensor, k: torch.Tensor,
            v: torch.Tensor, output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            image = (self.image_of(guided, x) for x in (q, k, v))
            text, made, rest = self.attend(guided, name, block, stream, *image)
            if following is not None:
                followed = self.follow(block, stream, text.flatten(2), rest)
                guided.scratch["stream", following] = followed
            if not guided.extrapolates(name):
                return None
            whole = self.image_of(guided, output)
            width = made.shape[2:].numel()
            own = whole[..., :width].unflatten(-1, (layer.heads, -1))
            changed = guided.extrapolate(name, own, made, by_head=True).flatten(2)
            if width < whole.shape[-1]:  # a feed-forward layer shares the last projection
                changed = torch.cat([changed.to(whole.dtype), whole[..., width:]], -1)
            return self.with_image(guided, output, changed)

        joined_attention(hooks, name, layer, attend)

    @abstractmethod
    def attend(
        self, guided: GuidedPass, name: str, block: Any, stream: torch.Tensor, q: torch.Tensor,
        k: torch.Tensor, v: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:  # fmt: skip
        """Attention among the negative prompt's tokens and the image's in one block.

        Args:
            name: of the attention layer.
            stream: (N, L, d) the negative prompt's tokens as they enter the block.
            q: (N, I, heads, width) the pass's queries of the image, not rotated yet.
            k: the keys, which may be of fewer heads.
            v: (N, I, d) the values.

        Returns:
            (N, L, heads, width) the answer to the text's tokens, (N, I, heads, width) to the
            image's, and what :meth:`follow` needs besides.
        """

    @abstractmethod
    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        """The stream as it enters the next block.

        Args:
            stream: (N, L, d) as it entered this block.
            text: (N, L, d) the attention's answer to its tokens, before the last projection.
            rest: from :meth:`attend`.
        """
