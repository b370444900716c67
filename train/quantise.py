"""Frozen weights in 8 or 4 bits: torchao's int8 and float8, bitsandbytes' nf4. The LoRA on top stays in float32.

Only the linear layers of the blocks are quantised, and of them not the modulation's, whose errors every token would
share: what diffusers leaves out of its own layerwise casting is left out here. A weight is made whole again for one
product at a time, in forward and again in backward; autograd keeps the quantised one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from shared.errors import ConfigError
from shared.float8 import check_float8
from train.host import has_no_storage

NF4_BLOCK, NF4_STATISTICS = 64, 256  # weights that share a scale, and scales that share one, in bitsandbytes
SKIPPED = ("norm",)  # as CogVideoXTransformer3DModel._skip_layerwise_casting_patterns, in the blocks


def quantise(transformer: Any, precision: str, device: torch.device) -> str | None:
    """Quantise the frozen linear layers of the blocks, in place.

    Args:
        transformer: with its LoRA; its weights may be tensors without storage.
        precision: native, int8, fp8 or nf4.
        device: that the blocks will be computed on.

    Returns:
        What is not as on a real run, for a prediction to say; None: all is.

    Raises:
        ConfigError: the device cannot, or the library is not installed.
    """
    if precision == "native":
        return None
    check_precision(precision, device)
    note = None
    for parent, name, layer in _frozen_layers(transformer.transformer_blocks):
        weight = _quantised(layer, precision)
        if precision == "nf4" and has_no_storage(weight):
            note = "nf4: weights stood in for by tensors of as many bytes"
        setattr(parent, name, FrozenLinear(weight, layer.bias, layer.weight.shape))
    return note


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse a precision that cannot be had.

    Raises:
        ConfigError: the device cannot, or the library is not installed.
    """
    if precision == "native":
        return
    if precision == "fp8":
        check_float8("--base_precision fp8", str(device))
    library = "bitsandbytes" if precision == "nf4" else "torchao"
    try:
        __import__(library)
    except ImportError as error:
        raise ConfigError(
            f"--base_precision {precision}: {library} is not installed; pip install -c constraints.txt '.[quant]'"
        ) from error


class FrozenLinear(torch.nn.Module):
    """A linear layer whose weight is quantised and never trained."""

    def __init__(self, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None, shape: torch.Size) -> None:
        """`shape` [out, in] of the weight when it is whole."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.weight, self.bias = weight, bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move it; torch.nn.Module would take what bitsandbytes moves for a plain tensor, and lose its scales."""
        weight = self.weight
        if getattr(weight, "quant_state", None) is None:
            return super()._apply(fn, recurse)
        self._parameters["weight"] = None
        super()._apply(fn, recurse)
        self._parameters["weight"] = fn(weight)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out] of [..., in], in the dtype that autocast gives to products."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        result: torch.Tensor = _Product.apply(x, self.weight, self.bias, (self.out_features, self.in_features))
        return result


class _Product(torch.autograd.Function):
    """x W' + b, where W is made whole for the product alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: torch.Tensor | None, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.weight, ctx.shape = weight, shape  # frozen: nothing may change it between here and backward
        return functional.linear(x, dequantised(weight, shape, x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grads[0] @ dequantised(ctx.weight, ctx.shape, grads[0].dtype), None, None, None


def dequantised(weight: Any, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    """The whole weight [out, in]."""
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        whole: torch.Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return whole.to(dtype)
    if type(weight).__name__ == "Int8Tensor":
        # symmetric, a scale a row; float32 times int8 rounded once, and no float32 copy of the weight on a GPU
        return torch.mul(weight.qdata, weight.scale, out=torch.empty(shape, dtype=dtype, device=weight.qdata.device))
    if has_no_storage(weight) and weight.dtype == torch.uint8:  # stands in for nf4
        return torch.empty(shape, dtype=dtype, device=weight.device)
    whole = weight.data.dequantize()
    return whole.to(dtype)


def _frozen_layers(blocks: torch.nn.Module) -> list[tuple[torch.nn.Module, str, torch.nn.Linear]]:
    return [
        (parent, name, layer)
        for path, parent in blocks.named_modules()
        for name, layer in parent.named_children()
        if isinstance(layer, torch.nn.Linear)
        and not layer.weight.requires_grad
        and not any(part.startswith(SKIPPED) for part in (*path.split("."), name))
    ]


def _quantised(layer: torch.nn.Linear, precision: str) -> torch.nn.Parameter:
    if precision == "nf4":
        return _nf4(layer.weight)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = layer.weight
    quantize_(plain, Int8WeightOnlyConfig() if precision == "int8" else Float8WeightOnlyConfig())
    return torch.nn.Parameter(plain.weight.data, requires_grad=False)


def _nf4(weight: torch.Tensor) -> torch.nn.Parameter:
    if has_no_storage(weight):  # bitsandbytes cannot; the bytes are those of its packed weights and nested scales
        scales = -(-weight.numel() // NF4_BLOCK)
        size = -(-weight.numel() // 2) + scales + 4 * -(-scales // NF4_STATISTICS) + 4 * (16 + 256)
        return torch.nn.Parameter(torch.empty(size, dtype=torch.uint8, device=weight.device), requires_grad=False)
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Params4bit

    data, state = quantize_4bit(weight.data, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4")
    parameter: torch.nn.Parameter = Params4bit(
        data, requires_grad=False, quant_state=state, blocksize=NF4_BLOCK, quant_type="nf4", bnb_quantized=True
    )
    return parameter
