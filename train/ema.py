"""The exponential moving average of the LoRA over optimizer steps: less noise than the last step's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Ema:
    """Averages of parameters, in float32, beside them on their device.

    Decay rises with the steps, so that the first ones, which are far from where the run goes, are soon forgotten:
    min(decay, (1 + step) / (10 + step)), and the average starts as the weights after the first step.
    """

    def __init__(self, parameters: list[torch.nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.averages = [parameter.detach().float().clone() for parameter in parameters]

    def update(self, step: int, stands: torch.Tensor) -> None:
        """Take in the weights that optimizer step `step` (from 0) led to; if it `stands`, which the device knows."""
        decay = min(self.decay, (1 + step) / (10 + step)) if step else 0.0
        weight = stands.float() * (1 - decay)
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.lerp_(parameter.detach(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are the averages: to evaluate, to save and to load them. Nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for number, parameter in enumerate(self.parameters):
            parameter.data, self.averages[number] = self.averages[number], parameter.data
