"""Weights of 8 bits at inference: torchao's or quanto's int8 and float8, made whole again for one product at a time.

Of the transformer, the blocks' linear layers but the modulation's are quantised, as in training (train/quantise.py); of
T5 its linear layers; of the VAE its convolutions, which neither library takes by itself: their weights are quantised as
the matrices [out, in x time x height x width] that they are. A LoRA on top stays whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.utils import parametrize

SKIPPED = ("norm", "lora_")  # in the names of modules


def quantise(module: Any, precision: str, quantiser: str | None) -> None:
    """Quantise a transformer, a T5 encoder or a VAE, in place.

    Args:
        precision: native, int8 or fp8.
        quantiser: torchao or quanto.
    """
    if precision == "native":
        return
    convolutions = [one for one in module.modules() if isinstance(one, torch.nn.Conv3d)]
    for convolution in convolutions:
        convolution.requires_grad_(False)
        matrix = _quantised(convolution.weight.flatten(1), precision, str(quantiser))
        whole = _Whole(matrix, convolution.weight)
        parametrize.register_parametrization(convolution, "weight", whole)
    if convolutions:
        return
    blocks = getattr(module, "transformer_blocks", module)
    if quantiser == "torchao":
        _torchao(blocks, precision)
    else:
        _quanto(blocks, precision)


def _torchao(module: Any, precision: str) -> None:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    def is_taken(layer: Any, name: str) -> bool:
        return isinstance(layer, torch.nn.Linear) and not any(word in name for word in SKIPPED)

    quantize_(module, Int8WeightOnlyConfig() if precision == "int8" else Float8WeightOnlyConfig(), is_taken)


def _quanto(module: Any, precision: str) -> None:
    from optimum.quanto import freeze, qfloat8, qint8, quantize

    quantize(module, weights=qint8 if precision == "int8" else qfloat8, exclude=[f"*{word}*" for word in SKIPPED])
    freeze(module)


def _quantised(matrix: torch.Tensor, precision: str, quantiser: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [out, in] in 8 bits, and its scales [out, 1]."""
    layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(matrix, requires_grad=False)
    holder: Any = torch.nn.Sequential(layer)  # quanto puts another layer in its place
    if quantiser == "torchao":
        _torchao(holder, precision)
        return holder[0].weight.qdata, holder[0].weight.scale
    _quanto(holder, precision)
    return holder[0].weight._data, holder[0].weight._scale


class _Whole(torch.nn.Module):
    """A convolution's weight of its quantised matrix, made at each use."""

    def __init__(self, matrix: tuple[torch.Tensor, torch.Tensor], weight: torch.Tensor) -> None:
        super().__init__()
        self._matrix, self._shape, self._dtype = matrix, weight.shape, weight.dtype

    def forward(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The weight [out, in, time, height, width]."""
        return (values.to(self._dtype) * scale.to(self._dtype)).view(self._shape)

    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is held in place of the weight."""
        matrix = self._matrix
        del self._matrix  # the convolution holds it from here on
        return matrix


def cast_layerwise(transformer: Any) -> None:
    """Hold the transformer's weights in float8 at rest, each made whole where it is computed with; not the LoRA's."""
    skipped = (*transformer._skip_layerwise_casting_patterns, "lora_")
    transformer.enable_layerwise_casting(torch.float8_e4m3fn, transformer.dtype, skip_modules_pattern=skipped)
