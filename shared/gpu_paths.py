"""What a GPU holds where a CPU holds something else, for counting a step on a machine without one.

Two of a CPU's paths hold other tensors: attention that writes out all scores (flash attention does not), and layer
norms in autocast's lower precision (CUDA's autocast gives them, and their results, float32).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_map_only


@contextmanager
def gpu_paths() -> Iterator[None]:
    """Within: attention and layer norms hold what they hold on a GPU. Shapes and dtypes only, no numbers."""
    attention, layer_norm = functional.scaled_dot_product_attention, functional.layer_norm

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
        result: torch.Tensor = _Flash.apply(*map(_lowered, (query, key, value)))
        return result

    def in_float32(*given: Any, **named: Any) -> torch.Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return layer_norm(*given, **named)
        given, named = tree_map_only(torch.Tensor, torch.Tensor.float, (given, named))
        with torch.autocast("cpu", enabled=False):
            return layer_norm(*given, **named)

    # by name, as diffusers calls them: a torch function mode is not in force where a backward pass computes again
    functional.scaled_dot_product_attention = flash  # type: ignore[assignment]
    functional.layer_norm = in_float32
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, functional.layer_norm = attention, layer_norm


def _lowered(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else tensor


class _Flash(torch.autograd.Function):
    """What flash attention holds: heads, result and a float32 a row; in backward the gradients and a float32 sum."""

    @staticmethod
    def forward(ctx: Any, *heads: torch.Tensor) -> torch.Tensor:
        query = heads[0]
        batch, number, tokens, size = query.shape
        result = query.new_empty(batch, tokens, number, size).transpose(1, 2)
        ctx.save_for_backward(*heads, result, query.new_empty(batch, number, tokens, dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *heads, _, rows = ctx.saved_tensors
        sums = heads[0].new_empty(heads[0].shape, dtype=torch.float32), torch.empty_like(rows)
        found = tuple(torch.empty_like(head) for head in heads)
        del sums
        return found
