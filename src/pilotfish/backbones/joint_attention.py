"""Joint attention, extrapolated away from the negative prompt: ``a + g (a - a_n)``.

The text is a stream of tokens of its own that changes from block to block. The negative text's
stream runs beside the pass, on the denoiser's own weights, against the pass's own image keys and
values; or against itself alone, once a call for all steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pilotfish.backbones.context import GuidedPass
from pilotfish.backbones.extrapolation import split_heads
from pilotfish.backbones.hooks import Hooks


def joined_attention(
    hooks: Hooks, name: str, layer: Any, attend: Callable[..., torch.Tensor | None]
) -> None:  # fmt: skip
    """Extrapolate a layer in which the tokens of text and image attend to each other.

    Args:
        attend: ``attend(guided, q, k, v, output)`` with the pass's own queries and keys, (N,
            tokens, heads, width), and values, (N, tokens, d), before they are rotated, and what
            enters the layer's last projection, (N, tokens, d), or comes out of a layer without
            one. It returns the changed output, or None to leave it as it is.
    """
    fused = getattr(layer, "to_qkv_mlp_proj", None)  # serves the feed-forward layer as well

    def by_head(output: torch.Tensor) -> torch.Tensor:
        """A norm is given heads."""
        return output if output.ndim == 4 else output.unflatten(-1, (layer.heads, -1))

    def values(output: torch.Tensor) -> torch.Tensor:
        width = layer.inner_dim
        return output if fused is None else output[..., 2 * width : 3 * width]

    def before(guided: GuidedPass, module: Any, args: Any, kwargs: Any) -> Any:
        q, k, v = (guided.scratch.pop((name, part), None) for part in "qkv")
        if q is None or k is None or v is None:
            return None  # the projections are fused; the end of the call reports it
        changed = attend(guided, q, k, v, args[0])
        if changed is None or torch.is_grad_enabled() or args[0].is_contiguous():
            return None if changed is None else ((changed, *args[1:]), kwargs)
        _copy(args[0], changed)
        return None

    def after(guided: GuidedPass, module: Any, args: Any, output: torch.Tensor) -> Any:
        made = before(guided, module, (output,), {})
        return None if made is None else made[0][0]

    hooks.keep(layer.to_q if layer.norm_q is None else layer.norm_q, (name, "q"), by_head)
    hooks.keep(layer.to_k if layer.norm_k is None else layer.norm_k, (name, "k"), by_head)
    hooks.keep(layer.to_v if fused is None else fused, (name, "v"), values)
    if getattr(layer, "pre_only", False):  # the last projection is part of a later layer
        hooks.after(layer, after)
    else:
        hooks.before(layer.to_out[0] if fused is None else layer.to_out, before)


def head_width(layer: Any) -> int:
    """Channels of a head of a layer of :func:`joined_attention`."""
    return int(layer.inner_dim) // int(layer.heads)


def text_heads(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, (N, L, heads, width), that a layer of :func:`joined_attention`
    makes of the text's tokens (N, L, d), by projections of their own where it has them."""
    if getattr(layer, "add_q_proj", None) is None:
        projections, norms = (layer.to_q, layer.to_k, layer.to_v), (layer.norm_q, layer.norm_k)
    else:
        projections = layer.add_q_proj, layer.add_k_proj, layer.add_v_proj
        norms = layer.norm_added_q, layer.norm_added_k
    width = head_width(layer)
    q, k, v = (projection.forward(x).unflatten(-1, (-1, width)) for projection in projections)
    q, k = (y if norm is None else norm.forward(y) for y, norm in zip((q, k), norms, strict=True))
    return q, k, v


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention of tokens by heads, (N, tokens, heads, width).

    Args:
        mask: (N, 1, 1 or tokens, tokens) which count, or what is added to the scores.
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def clipped(stream: torch.Tensor) -> torch.Tensor:
    """A stream within half precision, as some denoisers keep it from block to block."""
    return stream.clip(-65504, 65504) if stream.dtype == torch.float16 else stream


def _copy(output: torch.Tensor, changed: torch.Tensor) -> None:
    """Write the changed output in place: a linear layer rounds otherwise where its input lies in
    memory as a part of the joined tokens, and a fresh guide is to change no bit in half
    precision."""
    output.copy_(changed)


def exchange_text(
    answer: torch.Tensor, q: torch.Tensor, k: torch.Tensor, text: Sequence[torch.Tensor],
    negative: Sequence[torch.Tensor], image_tokens: int,
) -> torch.Tensor:  # fmt: skip
    """Attention's answer with another text in place of the one it had, without a second attention
    among the image's tokens.

    With Z the sum of exp(q k) over the keys of image (i), text (t) and negative text (n), and o the
    answer of attention to the tokens of one text alone, ::

        a_n = a + ((Z_t - Z_n) a - Z_t o_t + Z_n o_n) / (Z_i + Z_n)

    is exact. Z_i alone runs over many keys; it is estimated from some of them.

    Args:
        answer: a, (N, I, heads, width).
        q: the queries of the image, (N, heads, I, width).
        k: its keys, (N, heads, I, width).
        text: keys and values of the text, (N, heads, L, width) each.
        negative: those of the negative text; L may differ.
        image_tokens: how many of the image's keys stand for all, spread evenly over them.
    """
    step, n = _coprime_step(k.shape[2]), min(image_tokens, k.shape[2])
    some = k[:, :, torch.arange(n, device=k.device) * step % k.shape[2]]
    (k_t, v_t), (k_n, v_n) = text, negative
    keys = torch.cat([some, k_t, k_n], 2)
    values = torch.cat([torch.zeros_like(some), -v_t, v_n], 2)
    # the shares of both texts in the softmax, as the first two channels of a second answer
    of_text = torch.zeros_like(values[:1, :1])
    of_text[..., n : n + k_t.shape[2], 0] = 1
    of_text[..., n + k_t.shape[2] :, 1] = 1
    change, shares = (
        F.scaled_dot_product_attention(q, keys, x.expand(keys.shape)).transpose(1, 2)
        for x in (values, of_text)
    )
    z_t, z_n = shares[..., :1], shares[..., 1:2]
    z_i = (1 - z_t - z_n) * (k.shape[2] / n)
    return answer + ((z_t - z_n) * answer + change) / (z_i + z_n)


def _coprime_step(tokens: int) -> int:
    """A step that leads through all tokens of a grid and spreads the first of them evenly over its
    rows and columns (the golden section's lattice)."""
    step = round(tokens * 0.618)
    while math.gcd(step, tokens) != 1:
        step += 1
    return step


class JointBlock:
    """A block of diffusers' ``JointTransformerBlock`` class (Stable Diffusion 3), as
    :class:`JointAttention` reads it. A subclass reads another implementation.

    Attributes:
        heads: of the attention.
        out: the projection of the image's answer.
        text_ends: whether the text's stream ends here, as in the last block.
    """

    def __init__(self, block: Any) -> None:
        self.block, self.layer = block, block.attn
        self.heads: int = self.layer.heads
        self.out: nn.Module = self.layer.to_out[0]
        self.text_ends: bool = block.context_pre_only

    def capture_qkv(self, hooks: Hooks, name: str, *, of_text: bool) -> None:
        """Place hooks that keep the pass's queries, keys and values of the image, (N, heads,
        tokens, width), as ``scratch[name, "q"]`` and so on, and with ``of_text`` the text's keys
        and values as ``scratch[name, "text k"]`` and ``scratch[name, "text v"]``."""
        layer = self.layer
        captured = [
            ("q", layer.to_q, layer.norm_q), ("k", layer.to_k, layer.norm_k),
            ("v", layer.to_v, None),
        ]  # fmt: skip
        if of_text:
            captured += [
                ("text k", layer.add_k_proj, layer.norm_added_k),
                ("text v", layer.add_v_proj, None),
            ]
        for part, projection, norm in captured:
            if norm is None:
                hooks.keep(projection, (name, part), lambda output: split_heads(output, self.heads))
            else:  # a norm is given heads
                hooks.keep(norm, (name, part))

    def read(
        self, stream: torch.Tensor, embedding: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
        """Queries, keys and values, (N, heads, L, width), of a text's stream (N, L, d) at an
        embedding of time and pooled text (N, d); and what :meth:`follow` takes of that embedding.
        """
        block, layer = self.block, self.layer
        rest: Any = ()
        if self.text_ends:
            x = block.norm1_context.forward(stream, embedding)
        else:
            x, *rest = block.norm1_context.forward(stream, emb=embedding)
        q, k, v = (
            split_heads(projection.forward(x), self.heads)
            for projection in (layer.add_q_proj, layer.add_k_proj, layer.add_v_proj)
        )
        q = q if layer.norm_added_q is None else layer.norm_added_q.forward(q)
        k = k if layer.norm_added_k is None else layer.norm_added_k.forward(k)
        return (q, k, v), rest

    def text_modules(self) -> Iterator[nn.Module]:
        """All modules that :meth:`read` and :meth:`follow` use, and those that hold them."""
        block, layer = self.block, self.layer
        yield from (block, layer)
        for module in (
            block.norm1_context, layer.add_q_proj, layer.add_k_proj, layer.add_v_proj,
            layer.norm_added_q, layer.norm_added_k, getattr(layer, "to_add_out", None),
            block.norm2_context, block.ff_context,
        ):  # fmt: skip
            yield from () if module is None else module.modules()

    def follow(self, stream: torch.Tensor, answer: torch.Tensor, rest: Any) -> torch.Tensor:
        """The stream as it enters the next block, from the attention's answer to its tokens
        (N, L, d)."""
        block = self.block
        gate, shift, scale, gate_ff = (r[:, None] for r in rest)
        stream = stream + gate * self.layer.to_add_out(answer)
        hidden = block.norm2_context(stream) * (1 + scale) + shift
        followed: torch.Tensor = stream + gate_ff * block.ff_context(hidden)
        return followed


class JointAttention:
    """The negative text's stream beside the pass, in blocks of Stable Diffusion 3
    (:class:`JointBlock`).

    At block i the stream is kept under the block's name, not as a running value: gradient
    checkpointing runs blocks again.

    Args:
        blocks: by the names of their attention layers, all up to the last that is extrapolated, in
            the order in which they run.
        image_tokens: take ``a_n`` from ``a`` by :func:`exchange_text`, with so many of the image's
            tokens. None, or where there are no more, a second attention among them all.
        cached: the stream's tokens attend to each other alone, so that it is one for all images
            and can be made for all steps at once (:meth:`at_all_times`). Otherwise they attend to
            the image's, as the unconditional pass does.
    """

    def __init__(
        self, blocks: Mapping[str, JointBlock], *, image_tokens: int | None = None,
        cached: bool = False,
    ) -> None:  # fmt: skip
        self.blocks, self.image_tokens, self.cached = blocks, image_tokens, cached
        names = list(blocks)
        self.following = dict(zip(names, [*names[1:], None], strict=False))

    def at_all_times(self, stream: torch.Tensor, embedding: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values, (N, heads, L, width), of a stream in all blocks, in their order.

        Args:
            stream: (N, L, d) embedded tokens.
            embedding: (N, d) the embeddings of time and pooled text.
        """
        made = []
        for name, block in self.blocks.items():
            (q, k, v), rest = block.read(stream, embedding)
            made += [k, v]
            if self.following[name] is not None and not block.text_ends:
                own = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
                stream = block.follow(stream, own.flatten(2), rest)
        return made

    def begin(self, guided: GuidedPass, stream: torch.Tensor) -> None:
        """A denoiser call starts, in which the stream is not known beforehand. The embedding of
        time and the negative prompt's pooled text is ``scratch["negative embedding"]``, (N, d).

        Args:
            stream: (N, L, d) the negative prompt's embedded tokens.
        """
        guided.scratch["stream", next(iter(self.blocks))] = stream

    def begin_known(self, guided: GuidedPass, made: Sequence[torch.Tensor]) -> None:
        """A denoiser call starts, with what :meth:`at_all_times` made for its time."""
        for name, known in zip(self.blocks, zip(made[::2], made[1::2], strict=True), strict=True):
            guided.scratch["keys and values", name] = known

    def place(self, hooks: Hooks, name: str) -> None:
        """Extrapolate the attention of one block, where it has a gain (N, heads), and take the
        negative text's stream to the next block."""
        block = self.blocks[name]

        def extrapolated(guided: GuidedPass, module: Any, args: Any, kwargs: Any) -> Any:
            image = [guided.scratch.pop((name, part), None) for part in "qkv"]
            of_text = [guided.scratch.pop((name, f"text {part}"), None) for part in "kv"]
            if any(part is None for part in image):
                return None  # the projections are fused; the end of the call reports it
            found = self._negative(guided, name, image)
            if found is None or not guided.extrapolates(name):
                return None
            output = args[0].unflatten(-1, (block.heads, -1))
            changed = guided.extrapolate(
                name, output, self._answer(image, of_text, found, output), by_head=True
            )
            if torch.is_grad_enabled() or args[0].is_contiguous():
                return (changed.flatten(2), *args[1:]), kwargs
            _copy(output, changed)
            return None

        block.capture_qkv(hooks, name, of_text=self.image_tokens is not None)
        hooks.before(block.out, extrapolated)

    def _negative(
        self, guided: GuidedPass, name: str, image: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Keys and values of the negative prompt's tokens, (1 or N, heads, L, width), and where it
        was made on the way the answer to the image's tokens, (N, heads, I, width)."""
        known = guided.scratch.get(("keys and values", name))
        if known is not None:
            return (*known, None)
        stream = guided.scratch.get(("stream", name))
        if stream is None:
            return None
        block, answer = self.blocks[name], None
        (q_n, k_n, v_n), rest = block.read(stream, guided.scratch["negative embedding"])
        if self.cached:
            own = F.scaled_dot_product_attention(q_n, k_n, v_n)
        else:
            q, k, v = image
            sampled = self._sampled(k)
            queries = q_n if sampled else torch.cat([q, q_n], 2)
            own = F.scaled_dot_product_attention(
                queries, torch.cat([k, k_n], 2), torch.cat([v, v_n], 2)
            )
            if not sampled:
                answer, own = own.split([q.shape[2], q_n.shape[2]], 2)
        following = self.following[name]
        if following is not None and not block.text_ends:
            followed = block.follow(stream, own.transpose(1, 2).flatten(2), rest)
            guided.scratch["stream", following] = followed
        return k_n, v_n, answer

    def _answer(
        self, image: Sequence[torch.Tensor], of_text: Sequence[torch.Tensor],
        found: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], output: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """The answer to the image's tokens with the negative prompt, (N, I, heads, width), to go
        with the pass's own."""
        q, k, v = image
        k_n, v_n, answer = found
        if answer is None:
            k_n, v_n = (x.expand(len(q), -1, -1, -1) for x in (k_n, v_n))
            if self._sampled(k):
                assert self.image_tokens is not None
                return exchange_text(output, q, k, of_text, (k_n, v_n), self.image_tokens)
            answer = F.scaled_dot_product_attention(
                q, torch.cat([k, k_n], 2), torch.cat([v, v_n], 2)
            )
        return answer.transpose(1, 2)

    def _sampled(self, k: torch.Tensor) -> bool:
        return self.image_tokens is not None and k.shape[2] > self.image_tokens
