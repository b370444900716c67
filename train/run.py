"""A run: all that its steps need, opened by `train/setup.py`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shared.console import warn
from shared.lora import LoraFacts
from shared.models import Facts
from shared.prompt_file import PromptRow
from train.checkpoint import RunState
from train.config import TrainConfig
from train.dropout import Visit
from train.holdout import HeldOut
from train.mixture import Mixture
from train.reading import LatentDataset
from train.sampler import Deal, Sampler
from train.samples import DrawSettings


@dataclass(frozen=True)
class Run:
    """A run that is ready for `first_step`.

    Attributes:
        model: what the forward pass is called on: the transformer, or its DDP wrapper.
        optimizer: as accelerate prepared it.
        schedule: abar [1000] of the noise schedule, on the device.
        visit: told before each forward pass which samples it is for.
        position: what a checkpoint must agree on to be gone on from.
        validation_rows: of validation videos; their pictures are in the run's folder.
        bad: what was said of samples that could not be read.
    """

    config: TrainConfig
    accelerator: Accelerator
    output_dir: Path
    facts: Facts
    samples: Mixture
    held_out: HeldOut | None
    reader: LatentDataset
    draws: DrawSettings
    sampler: Sampler
    deal: Deal
    model: Any
    optimizer: Any
    state: RunState
    visit: Visit
    schedule: torch.Tensor
    dtype: torch.dtype
    lora: LoraFacts
    position: dict[str, Any]
    first_step: int
    max_steps: int
    validation_rows: list[PromptRow]
    bad: set[str] = field(default_factory=set)

    def tell_bad(self, skipped: list[str]) -> None:
        """Say of each sample once that it could not be read, on whatever rank."""
        for what in skipped:
            if what not in self.bad:
                self.bad.add(what)
                warn(f"skipped, and its place left out of the mean: {what}")

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)
