"""A transformer block that keeps its inputs and nothing else, and is differentiated in stages.

Gradient checkpointing as it is usually done computes a block again whole, with its graph, and then differentiates it:
all that the block ever made is alive at once. Here a block is cut at its attention, and each part is computed again
just before it is differentiated:

    project   norm and modulation -> q, k, v with their norms and rotation     again without a graph, later with one
    attend    attention                                                        once
    finish    output projection -> gate, norm, feed-forward, gate              once, in chunks of tokens

What works token by token can be cut into chunks of tokens, whose graphs live one at a time. The projections that carry
the LoRA see all tokens at once, so that sums over tokens are rounded as they are without chunks.

The modules are diffusers' own, in the order of its CogVideoXBlock and CogVideoXAttnProcessor2_0; the tests compare with
them bit by bit. Shapes: B batch, T text tokens, S video tokens, L = T + S, D features, H heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

from train.host import Shelf
from train.residency import Residency

Rotary = tuple[torch.Tensor, torch.Tensor] | None
Tensors = tuple[torch.Tensor, ...]
Piece = tuple[slice, slice, slice]  # of the text, of the video, of both one after the other


class StagedBlock:
    """The forward pass of a CogVideoXBlock, to be put in its place."""

    def __init__(
        self, block: Any, number: int, *, chunks: int, residency: Residency | None, shelf: Shelf | None
    ) -> None:
        self.number, self.shelf = number, shelf
        self.trainable = [parameter for parameter in block.parameters() if parameter.requires_grad]
        self._block, self._chunks, self._residency = block, chunks, residency

    def __call__(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: Rotary = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensors:
        """As CogVideoXBlock: hidden_states [B, S, D] and encoder_hidden_states [B, T, D] of the next block."""
        if torch.is_grad_enabled():
            result: Tensors = _Staged.apply(
                self, image_rotary_emb, hidden_states, encoder_hidden_states, temb, *self.trainable
            )
            return result
        return self.forward(hidden_states, encoder_hidden_states, temb, image_rotary_emb)

    def forward(self, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, rotary: Rotary) -> Tensors:
        """The block without a graph."""
        with torch.no_grad(), self._weights(1), _autocast(*_autocast_of(hidden)):
            query, key, value = self._project(hidden, text, temb, rotary)
            attention = functional.scaled_dot_product_attention(query, key, value)
            del query, key, value
            projected = self._leave_attention(attention)
            del attention
            pieces = self._pieces(hidden, text)
            finished = (self._finish(hidden[:, v], text[:, t], projected[:, w], temb) for t, v, w in pieces)
            return _joined(finished, (1, 1), (hidden.shape[1], text.shape[1]))

    def gradients(
        self, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, rotary: Rotary, outer: Tensors
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        """Gradients of hidden and text, and of temb and the trainable parameters, given those of the outputs."""
        with self._weights(-1):
            sums = _Sums([*([temb] if temb.requires_grad else []), *self.trainable])
            with torch.no_grad():
                heads = [tensor.requires_grad_() for tensor in self._project(hidden, text, temb, rotary)]
            with torch.enable_grad():
                attention = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2])
            inner = attention.detach()
            grad_hidden, grad_text, grad_inner = self._differentiate_finish(hidden, text, temb, inner, outer, sums)
            del inner, outer
            grad_heads = list(torch.autograd.grad([attention], heads, [grad_inner]))
            del attention, heads, grad_inner
            self._differentiate_project(hidden, text, temb, rotary, grad_heads, (grad_hidden, grad_text), sums)
            shared = sums.values()
            return grad_hidden, grad_text, shared if temb.requires_grad else [None, *shared]

    def slots(self) -> Iterator[torch.Tensor]:
        """What is on the device of blocks that are streamed to it, this one or others."""
        return iter(()) if self._residency is None else self._residency.slots()

    def _weights(self, direction: int) -> AbstractContextManager[None]:
        return nullcontext() if self._residency is None else self._residency.block(self.number, direction)

    def _pieces(self, hidden: torch.Tensor, text: torch.Tensor) -> Iterator[Piece]:
        """Chunks of the tokens, text before video."""
        texts, tokens = text.shape[1], text.shape[1] + hidden.shape[1]
        bounds = [tokens * number // self._chunks for number in range(self._chunks + 1)]
        for start, end in pairwise(bounds):
            if start < end:
                yield (
                    slice(min(start, texts), min(end, texts)),
                    slice(max(start - texts, 0), max(end - texts, 0)),
                    slice(start, end),
                )

    def _normed(self, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """What the projections see of some tokens: [B, T + S, D]."""
        normed, normed_text, _, _ = self._block.norm1(hidden, text, temb)
        return _lowered(torch.cat([normed_text, normed], dim=1))

    def _all_normed(self, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        normed = ((self._normed(hidden[:, v], text[:, t], temb),) for t, v, _ in self._pieces(hidden, text))
        return _joined(normed, (1,), (text.shape[1] + hidden.shape[1],))[0]

    def _headed(self, raw: torch.Tensor, norm: Any, rotary: Rotary, piece: Piece) -> torch.Tensor:
        """Heads [B, H, L, D / H] of the projection [B, L, D] of a piece: normed, and rotated where it is video."""
        heads = raw.unflatten(2, (self._block.attn1.heads, -1)).transpose(1, 2)
        if norm is not None:
            heads = norm(heads)
        texts = piece[0].stop - piece[0].start
        if rotary is not None and heads.shape[2] > texts:
            turned = apply_rotary_emb(heads[:, :, texts:], (rotary[0][piece[1]], rotary[1][piece[1]]))
            heads = torch.cat([heads[:, :, :texts], turned], dim=2) if texts else turned
        return _lowered(heads)

    def _all_headed(self, raw: torch.Tensor, norm: Any, rotary: Rotary, pieces: list[Piece]) -> torch.Tensor:
        headed = ((self._headed(raw[:, piece[2]], norm, rotary, piece),) for piece in pieces)
        return _joined(headed, (2,), (raw.shape[1],))[0]

    def _project(self, hidden: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, rotary: Rotary) -> Tensors:
        """Queries, keys and values [B, H, L, D / H], without a graph."""
        attention, pieces = self._block.attn1, list(self._pieces(hidden, text))
        normed = self._all_normed(hidden, text, temb)
        heads = []
        for projection, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
            heads.append(self._all_headed(projection(normed), norm, rotary, pieces))
        value = attention.to_v(normed).unflatten(2, (attention.heads, -1)).transpose(1, 2)
        return heads[0], heads[1], value

    def _leave_attention(self, attention: torch.Tensor) -> torch.Tensor:
        """[B, L, D] of the heads' [B, H, L, D / H]."""
        output = self._block.attn1.to_out
        projected: torch.Tensor = output[1](output[0](attention.transpose(1, 2).flatten(2)))
        return projected

    def _finish(self, hidden: torch.Tensor, text: torch.Tensor, attention: torch.Tensor, temb: torch.Tensor) -> Tensors:
        """The block after its attention, of some tokens."""
        block, texts = self._block, text.shape[1]
        _, _, gate, text_gate = block.norm1(hidden[:, :0], text[:, :0], temb)
        hidden = hidden + gate * attention[:, texts:]
        text = text + text_gate * attention[:, :texts]
        normed, normed_text, gate, text_gate = block.norm2(hidden, text, temb)
        fed = block.ff(torch.cat([normed_text, normed], dim=1))
        return hidden + gate * fed[:, texts:], text + text_gate * fed[:, :texts]

    def _differentiate_finish(
        self,
        hidden: torch.Tensor,
        text: torch.Tensor,
        temb: torch.Tensor,
        attention: torch.Tensor,
        outer: Tensors,
        sums: _Sums,
    ) -> Tensors:
        """Gradients of hidden, text and the attention's heads, through the part after the attention."""
        attention = attention.requires_grad_()
        with torch.enable_grad():
            projected = self._leave_attention(attention)
        edge, inner = get_gradient_edge(projected), [projected.detach()]
        del projected  # its gradient is asked for, not itself

        def finished(inner: torch.Tensor) -> Iterator[Tensors]:
            for t, v, w in self._pieces(hidden, text):
                leaves = _leaf(hidden[:, v]), _leaf(text[:, t]), _leaf(inner[:, w])
                with torch.enable_grad():
                    outputs = self._finish(*leaves, temb)
                yield sums.differentiate(outputs, leaves, (outer[0][:, v], outer[1][:, t]))

        sizes = hidden.shape[1], text.shape[1], attention.shape[2]
        grad_hidden, grad_text, grad_inner = _joined(finished(inner.pop()), (1, 1, 1), sizes)
        (grad_attention,) = sums.differentiate((edge,), [attention], (grad_inner,))
        return grad_hidden, grad_text, grad_attention

    def _differentiate_project(
        self,
        hidden: torch.Tensor,
        text: torch.Tensor,
        temb: torch.Tensor,
        rotary: Rotary,
        grad_heads: list[torch.Tensor],
        grads: Tensors,
        sums: _Sums,
    ) -> None:
        """Add the gradients of hidden and text through the part before attention to `grads`; empties `grad_heads`."""
        attention = self._block.attn1
        with torch.no_grad():
            normed = self._all_normed(hidden, text, temb)
        normed.requires_grad_()
        with torch.enable_grad():
            raw = [attention.to_q(normed), attention.to_k(normed), attention.to_v(normed)]
        edges, grad_raw = [get_gradient_edge(one) for one in raw], []
        for norm in (attention.norm_q, attention.norm_k):
            pieces = self._pieces(hidden, text)
            grad_raw.append(self._differentiate_heads(raw.pop(0), norm, rotary, grad_heads.pop(0), pieces, sums))
        grad_raw.append(grad_heads.pop(0).transpose(1, 2).flatten(2))
        raw.clear()
        if self.shelf is not None:
            self.shelf.bring_ahead(self.number - 1)  # not before: the peak is there
        # in one go, as the whole block would be: the three are added up in the same order
        (grad_normed,) = sums.differentiate(edges, [normed], grad_raw)
        del grad_raw, normed
        for t, v, w in self._pieces(hidden, text):
            leaves = _leaf(hidden[:, v]), _leaf(text[:, t])
            with torch.enable_grad():
                output = self._normed(*leaves, temb)
            through = sums.differentiate((output,), leaves, (grad_normed[:, w],))
            del output, leaves
            grads[0][:, v] += through[0]
            grads[1][:, t] += through[1]

    def _differentiate_heads(
        self, raw: torch.Tensor, norm: Any, rotary: Rotary, grad: torch.Tensor, pieces: Iterable[Piece], sums: _Sums
    ) -> torch.Tensor:
        """The gradient of a projection [B, L, D], given that of its heads."""

        def through() -> Iterator[Tensors]:
            for piece in pieces:
                leaf = _leaf(raw[:, piece[2]])
                with torch.enable_grad():
                    heads = self._headed(leaf, norm, rotary, piece)
                yield sums.differentiate((heads,), [leaf], (grad[:, :, piece[2]],))

        return _joined(through(), (1,), (raw.shape[1],))[0]


class _Sums:
    """Gradients of tensors that several stages share."""

    def __init__(self, shared: list[torch.Tensor]) -> None:
        self._shared = shared
        self._values: list[torch.Tensor | None] = [None] * len(shared)

    def differentiate(
        self,
        outputs: Sequence[torch.Tensor] | Sequence[GradientEdge],
        leaves: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
    ) -> Tensors:
        """Gradients of `leaves`; those of the shared tensors are added up. The graph is freed."""
        found = torch.autograd.grad(outputs, [*leaves, *self._shared], grads, allow_unused=True)
        for number, grad in enumerate(found[len(leaves) :]):
            if grad is not None:
                before = self._values[number]
                self._values[number] = grad if before is None else before + grad
        return found[: len(leaves)]

    def values(self) -> list[torch.Tensor | None]:
        """The sums; None for what was not used."""
        return self._values


class _Staged(torch.autograd.Function):
    """Autograd's view of a block: from hidden, text, temb and the LoRA to the next hidden and text."""

    @staticmethod
    def forward(ctx: Any, staged: StagedBlock, rotary: Rotary, *inputs: torch.Tensor) -> Tensors:
        hidden, text, temb = inputs[:3]
        ctx.staged, ctx.rotary, ctx.autocast = staged, rotary, _autocast_of(hidden)
        if staged.shelf is None:
            ctx.save_for_backward(temb, hidden, text)
        else:
            staged.shelf.put(staged.number, (hidden, text))
            ctx.save_for_backward(temb)
        return staged.forward(hidden, text, temb, rotary)

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[Any, ...]:
        temb, *kept = ctx.saved_tensors
        hidden, text = kept or ctx.staged.shelf.take(ctx.staged.number)
        leaf = temb.detach().requires_grad_(ctx.needs_input_grad[4])
        with _autocast(*ctx.autocast):
            grad_hidden, grad_text, shared = ctx.staged.gradients(hidden, text, leaf, ctx.rotary, outer)
        return None, None, grad_hidden, grad_text, *shared


def _autocast_of(tensor: torch.Tensor) -> tuple[str, torch.dtype, bool]:
    kind = tensor.device.type
    return kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)


def _autocast(kind: str, dtype: torch.dtype, enabled: bool) -> AbstractContextManager[Any]:
    """Without its cache: casts of weights that are used once would be held for nothing."""
    return torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)


def _lowered(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that autocast gives to the product which comes next: cast now, half of it is held."""
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_()


def _joined(parts: Iterable[Tensors], dims: Sequence[int], sizes: Sequence[int]) -> Tensors:
    """Pieces put together along `dims` to `sizes`, each as it comes, so that none is held twice."""
    whole: list[torch.Tensor] = []
    filled = [0] * len(dims)
    for part in parts:
        if not whole:
            if all(tensor.shape[dim] == size for tensor, dim, size in zip(part, dims, sizes, strict=True)):
                return part
            for tensor, dim, size in zip(part, dims, sizes, strict=True):
                whole.append(tensor.new_empty([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]]))
        for number, (tensor, dim) in enumerate(zip(part, dims, strict=True)):
            length = tensor.shape[dim]
            whole[number].narrow(dim, filled[number], length).copy_(tensor)
            filled[number] += length
    return tuple(whole)
