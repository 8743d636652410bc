"""The families of transformers in which the tokens of text and image attend to each other, in two
streams or as one sequence.

A family states how a block takes the negative prompts' stream: its queries, keys and values
(:meth:`JoinedTransformerBackbone.read`) and the way to the next block
(:meth:`JoinedTransformerBackbone.follow`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from pilotfish.backbones.context import GuidedPass
from pilotfish.backbones.extrapolation import up_to_last
from pilotfish.backbones.hooks import Hooks
from pilotfish.backbones.joint_attention import attention, head_width, joined_attention
from pilotfish.backbones.transformer import KnownValues, TransformerBackbone


@dataclass(frozen=True)
class NegativeText:
    """The negative prompts as they enter the first block of a
    :class:`JoinedTransformerBackbone`.

    Attributes:
        stream: (N, L, d) their tokens.
        positions: the rotations of their tokens and of the image's, in the order of the denoiser's
            attention, (N or 1, L + I, k), (L + I, k) or a tuple of these; None where there are
            none.
        mask: (N, L) which of their tokens count; None where all do.
    """

    stream: torch.Tensor
    positions: Any = None
    mask: torch.Tensor | None = None


class JoinedTransformerBackbone(TransformerBackbone):
    """A transformer in which the tokens of text and image attend to each other.

    The negative prompts' tokens are a stream beside the pass (:class:`NegativeStream`). In each
    block they take the text's layers (:meth:`read`, :meth:`follow`).
    """

    joint_attention_forms = ("whole",)
    text_first: ClassVar[bool] = True
    """Whether the text's tokens come before the image's in its attention."""
    embedders: ClassVar[tuple[str, ...]]
    """The names of the modules that embed text and time for the text's layers."""

    def place(self, hooks: Hooks) -> None:
        attention = up_to_last(
            [name for name, _ in self.sites()["attention"]], hooks.guide.extrapolated
        )
        blocks = {name: hooks.modules[name.rpartition(".")[0]] for name in attention}
        stream = NegativeStream(self, blocks, cached=hooks.guide.negative_stream == "cached")
        if blocks and stream.cached:
            hooks.before_graph(self.denoiser, stream.take)
        self.place_text(hooks, stream)
        for name in blocks:
            self.place_attention(hooks, name, stream)
        self.place_residuals(hooks)

    def place_text(self, hooks: Hooks, stream: NegativeStream) -> None:
        """Begin the negative prompts' stream when the prompts are embedded, and keep the pass's
        embedding of time that :meth:`read` takes, (N, ...), as ``scratch["embedding"]``."""

        def embedded(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> None:
            stream.begin(guided)

        hooks.after(hooks.modules[self.text_layer], embedded)

    def place_attention(self, hooks: Hooks, name: str, stream: NegativeStream) -> None:
        """Extrapolate one attention layer where the guide has a gain for it, and take the negative
        prompts' stream to the next."""
        layer = hooks.modules[name]

        def attend(
            guided: GuidedPass, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
            output: torch.Tensor,
        ) -> torch.Tensor | None:  # fmt: skip
            q, k, v = (self.image_of(guided, x) for x in (q, k, v))
            v = v.unflatten(-1, (-1, head_width(layer)))
            made = stream.attend(guided, name, q, k, v)
            if made is None or not guided.extrapolates(name):
                return None
            whole = self.image_of(guided, output)
            width = made.shape[2:].numel()
            own = whole[..., :width].unflatten(-1, (layer.heads, -1))
            changed = guided.extrapolate(name, own, made, by_head=True).flatten(2)
            if width < whole.shape[-1]:  # a feed-forward layer shares the last projection
                changed = torch.cat([changed.to(whole.dtype), whole[..., width:]], -1)
            return self.with_image(guided, output, changed)

        joined_attention(hooks, name, layer, attend)

    # -- the negative prompts' stream -------------------------------------------------------

    def negative_text(self, guided: GuidedPass) -> NegativeText:
        """The negative prompts of a pass, embedded."""
        return NegativeText(self.embedded_negative(guided))

    def embedded_negative(self, guided: GuidedPass) -> torch.Tensor:
        """(N, L, d) the negative prompts after :attr:`text_layer`, embedded once in a pass."""
        made: torch.Tensor | None = guided.scratch.get("negative embeds")
        if made is None:
            made = guided.scratch["negative embeds"] = self.embed_negative(guided)
        return made

    def embed_negative(self, guided: GuidedPass) -> torch.Tensor:
        """(N, L, d) the negative prompts after :attr:`text_layer`."""
        layer: Any = self.denoiser.get_submodule(self.text_layer)
        made: torch.Tensor = guided.cache.made_by(
            layer, lambda: layer.forward(guided.negative.embeds), [layer]
        )
        return made

    def stream_rows(self, guided: GuidedPass) -> int:
        """How many rows a stream has at one time that no image enters."""
        return len(guided.negative)

    @abstractmethod
    def embedding_at(
        self, guided: GuidedPass, times: torch.Tensor, stream: torch.Tensor
    ) -> torch.Tensor:
        """The embedding of times, (R, ...), that :meth:`read` takes.

        Args:
            times: (R,) as the denoiser is given them.
            stream: (N, L, d), for its precision.
        """

    @abstractmethod
    def read(
        self, name: str, block: Any, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        """Queries, keys and values, (R, L, heads, width), of a stream in one block, before they are
        rotated, and what :meth:`follow` needs besides. Keys and values may be of fewer heads.

        Args:
            name: of the attention layer.
            stream: (R, L, d) as it enters the block.
            embedding: (R, ...) of time.
        """

    def rotated(self, x: torch.Tensor, positions: Any) -> torch.Tensor:
        """Queries or keys (R, tokens, heads, width) by their places.

        Args:
            positions: from :class:`NegativeText`, for these tokens.
        """
        return x

    def attention(
        self, block: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention in a block, as in :func:`~pilotfish.backbones.joint_attention.attention`."""
        return attention(q, k, v, mask)

    def pairs(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(N, 1, 1 or Q, K) the mask of attention, from masks of its queries (N, Q) and its keys
        (N, K)."""
        return keys[:, None, None]

    @abstractmethod
    def follow(
        self, block: Any, stream: torch.Tensor, text: torch.Tensor, rest: Any
    ) -> torch.Tensor:  # fmt: skip
        """The stream as it enters the next block.

        Args:
            stream: (R, L, d) as it entered this block.
            text: (R, L, d) the attention's answer to its tokens, before the last projection.
            rest: from :meth:`read`.
        """


class NegativeStream(KnownValues):
    """The negative prompts' tokens as a stream through the blocks of a
    :class:`JoinedTransformerBackbone`.

    At each block the stream is kept under the name of the attention layer, not as a running value:
    gradient checkpointing runs blocks again.

    Args:
        backbone: of the denoiser.
        blocks: by the names of their attention layers, all up to the last that is extrapolated, in
            running order.
        cached: the stream's tokens attend to each other alone, so that it is one for all images
            and can be made for all steps at once. Otherwise they attend to the pass's image keys
            and values as well, as in the unconditional pass.
    """

    backbone: JoinedTransformerBackbone

    def __init__(
        self, backbone: JoinedTransformerBackbone, blocks: Mapping[str, Any], *, cached: bool
    ) -> None:
        super().__init__(backbone)
        self.blocks, self.cached = blocks, cached
        names = list(blocks)
        self.following = dict(zip(names, [*names[1:], None], strict=False))

    # -- at all times -----------------------------------------------------------------------

    def rows(self, guided: GuidedPass) -> int:
        return self.backbone.stream_rows(guided)

    def make(self, guided: GuidedPass, times: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values, (T N, L, heads, width), in all blocks, in their order."""
        text = self.backbone.negative_text(guided)
        embedding = self.backbone.embedding_at(guided, times, text.stream)
        stream: torch.Tensor | None = over_rows(text.stream, len(times))
        made: list[torch.Tensor] = []
        for name in self.blocks:
            assert stream is not None
            k, v, stream = self._alone(name, stream, embedding, text)
            made += [k.contiguous(), v.contiguous()]  # not parts of one larger projection
        return made

    def keep(self, guided: GuidedPass, known: Sequence[torch.Tensor]) -> None:
        self._keep_text(guided)
        for name, of_block in zip(
            self.blocks, zip(known[::2], known[1::2], strict=True), strict=True
        ):
            guided.scratch["keys and values", name] = of_block

    def modules(self) -> Iterator[nn.Module]:
        for name in self.backbone.embedders:
            yield from self.backbone.denoiser.get_submodule(name).modules()
        for block in self.blocks.values():
            yield from block.modules()

    def size(self, guided: GuidedPass) -> int:
        stream = self.backbone.negative_text(guided).stream
        layers = [self.backbone.denoiser.get_submodule(name) for name in self.blocks]
        widths = sum(getattr(layer, "inner_kv_dim", layer.inner_dim) for layer in layers)
        return int(self.rows(guided) * 2 * stream.shape[1] * widths * stream.element_size())

    # -- in the pass ------------------------------------------------------------------------

    def begin(self, guided: GuidedPass) -> None:
        """The prompts of a denoiser call are embedded: begin the stream, where it is not known."""
        first = next(iter(self.blocks), None)
        if first is None or ("keys and values", first) in guided.scratch:
            return
        assert guided.call is not None
        text, rows = self._keep_text(guided), len(guided.call.latents)
        if self.cached and guided.cache.one_time:
            rows = self.backbone.stream_rows(guided)
        guided.scratch["stream", first] = over_rows(text.stream, rows)

    def attend(
        self, guided: GuidedPass, name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor | None:  # fmt: skip
        """The answer of one layer to the image's tokens with the negative prompts, (N, I, heads,
        width). It takes the stream to the next block. None where it has not begun.

        Args:
            q: (N, I, heads, width) the pass's queries of the image, before they are rotated.
            k: the keys, which may be of fewer heads.
            v: the values.
        """
        known: Any = guided.scratch.get(("keys and values", name))
        stream: Any = guided.scratch.get(("stream", name))
        if known is None and stream is None:
            return None
        text = guided.scratch["negative text"]
        if not self.cached:
            return self._jointly(guided, name, stream, text, q, k, v)
        if known is None:
            embedding = guided.scratch["embedding"][: len(stream)]
            *known, followed = self._alone(name, stream, embedding, text)
            if followed is not None:
                guided.scratch["stream", self.following[name]] = followed
        if not guided.extrapolates(name):
            return None
        _, positions = self._positions(text)
        q, k = (self.backbone.rotated(x, positions) for x in (q, k))
        k, v = (
            self._joined(over_rows(x_n, len(q)), x) for x_n, x in zip(known, (k, v), strict=True)
        )
        mask = self._mask(guided, text, q)
        return self.backbone.attention(self.blocks[name], q, k, v, mask)

    def _jointly(
        self, guided: GuidedPass, name: str, stream: torch.Tensor, text: NegativeText,
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """What :meth:`attend` returns, where the stream attends to the image as well."""
        backbone, block, length = self.backbone, self.blocks[name], stream.shape[1]
        (q_n, k_n, v_n), rest = backbone.read(name, block, stream, guided.scratch["embedding"])
        mask = self._mask(guided, text, q)
        q, k = (
            backbone.rotated(self._joined(x_n, x), text.positions)
            for x_n, x in ((q_n, q), (k_n, k))
        )
        made = backbone.attention(block, q, k, self._joined(v_n, v), mask)
        of_text, of_image = self._parts(length)
        following = self.following[name]
        if following is not None:
            followed = backbone.follow(block, stream, made[:, of_text].flatten(2), rest)
            guided.scratch["stream", following] = followed
        return made[:, of_image]

    def _alone(
        self, name: str, stream: torch.Tensor, embedding: torch.Tensor, text: NegativeText
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values, (R, L, heads, width), of a stream whose tokens attend to each other
        alone, and the stream as it enters the next block, where one follows."""
        backbone, block = self.backbone, self.blocks[name]
        (q, k, v), rest = backbone.read(name, block, stream, embedding)
        positions, _ = self._positions(text)
        q, k = (backbone.rotated(x, positions) for x in (q, k))
        if self.following[name] is None:
            return k, v, None
        mask = None
        if text.mask is not None:
            counted = over_rows(text.mask, len(stream))
            mask = backbone.pairs(counted, counted)
        own = backbone.attention(block, q, k, v, mask)
        return k, v, backbone.follow(block, stream, own.flatten(2), rest)

    def _keep_text(self, guided: GuidedPass) -> NegativeText:
        text = guided.scratch["negative text"] = self.backbone.negative_text(guided)
        return text

    def _mask(
        self, guided: GuidedPass, text: NegativeText, image: torch.Tensor
    ) -> torch.Tensor | None:  # fmt: skip
        """(N, 1, 1 or Q, L + I) the mask of attention in the pass, made once for all blocks.

        Args:
            image: (N, I, ...) the image's tokens.
        """
        if text.mask is None:
            return None
        made: torch.Tensor | None = guided.scratch.get("negative mask")
        if made is None:
            of_image = text.mask.new_ones(len(text.mask), image.shape[1])
            keys = self._joined(text.mask, of_image)
            made = self.backbone.pairs(of_image[:, :1] if self.cached else keys, keys)
            made = guided.scratch["negative mask"] = made.expand(len(image), -1, -1, -1)
        return made

    # -- tokens of text and image -----------------------------------------------------------

    def _joined(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Tokens (N, L, ...) and (N, I, ...) in the order of the denoiser's attention."""
        return torch.cat([text, image] if self.backbone.text_first else [image, text], 1)

    def _parts(self, length: int) -> tuple[slice, slice]:
        """Where the tokens of the text, of this length, and of the image are among both."""
        if self.backbone.text_first:
            return slice(length), slice(length, None)
        return slice(-length, None), slice(-length)

    def _positions(self, text: NegativeText) -> tuple[Any, Any]:
        """The rotations of the text's tokens and of the image's."""

        def part(positions: Any, tokens: slice) -> Any:
            if isinstance(positions, tuple):
                return tuple(part(x, tokens) for x in positions)
            return None if positions is None else positions[..., tokens, :]

        of_text, of_image = self._parts(text.stream.shape[1])
        return part(text.positions, of_text), part(text.positions, of_image)


def over_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """A tensor (N, ...), over and over, as (rows, ...)."""
    if len(x) == rows:
        return x
    if len(x) == 1:
        return x.expand(rows, *x.shape[1:])
    return x.repeat(rows // len(x), *[1] * (x.ndim - 1))
