"""Dropout of the LoRA's inputs: masks are functions of (seed, step, place, layer), never of the global generator.

So they are the same on one rank or eight, after a resume or without one, and when gradient checkpointing computes a
block a second time. Each LoRA layer of the transformer gets a `LoraDropout` in the place of PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch

from shared.lora import ADAPTER, lora_layers
from shared.seeds import seed_for


class Visit:
    """Which step and places of the global batch the transformer sees: told before each forward pass."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.step = 0
        self.places: list[int] = []

    def see(self, step: int, places: list[int]) -> None:
        """The next pass, and its recomputation, is for the micro-batch at `places` of `step`."""
        self.step, self.places = step, places


class LoraDropout(torch.nn.Module):
    """Inverted dropout of a layer's input, whose first dimension is the micro-batch; none in eval mode."""

    def __init__(self, probability: float, name: str, visit: Visit) -> None:
        super().__init__()
        self.probability = probability
        self.name = name
        self.visit = visit

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The inputs [B, ...] with some zero and the others scaled up, so that their expectation is kept."""
        if not self.training:
            return inputs
        visit = self.visit
        assert inputs.shape[0] == len(visit.places), f"{self.name}: {inputs.shape[0]} rows, {len(visit.places)} places"
        keep = torch.empty(inputs.shape, dtype=torch.bool, device=inputs.device)
        for row, place in zip(keep, visit.places, strict=True):
            generator = torch.Generator(inputs.device)
            generator.manual_seed(seed_for(visit.seed, visit.step, place, "lora_dropout", self.name))
            row.bernoulli_(1 - self.probability, generator=generator)
        return inputs * keep / (1 - self.probability)


def add_dropout(transformer: Any, probability: float, seed: int) -> Visit:
    """Give each layer of the LoRA its dropout, where there is any; what is returned is told what the layers see."""
    visit = Visit(seed)
    if probability:
        for name, layer in lora_layers(transformer):
            layer.lora_dropout[ADAPTER] = LoraDropout(probability, name, visit)
    return visit
