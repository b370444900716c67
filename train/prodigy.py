"""Prodigy: Adam that estimates the size of its steps as it goes, from how far the weights are from where they began."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import redirect_stdout
from typing import Any

import torch

from shared.errors import ConfigError
from train.config import TrainConfig
from train.host import has_no_storage


class Counted(torch.optim.Optimizer, ABC):
    """The bytes that an optimizer holds, for tensors without storage, which it cannot step.

    Args:
        settings: `lr` and others, as the optimizer has them.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the state, where there is none."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter].update(self.moments(parameter))

    @abstractmethod
    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is held for a parameter."""


class CountedProdigy(Counted):
    """The bytes that Prodigy holds. Of a matrix that begins at zero it is less by one copy, which no shape tells."""

    def moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adam's two, the sum that the estimate is made of, and where the parameter began."""
        names = ("exp_avg", "exp_avg_sq", "s", "p0") if self.defaults["betas"][0] > 0 else ("exp_avg_sq", "s", "p0")
        return {name: torch.empty_like(parameter) for name in names}


def make_prodigy(
    config: TrainConfig, parameters: list[torch.nn.Parameter], settings: dict[str, Any]
) -> torch.optim.Optimizer:
    """Prodigy over some parameters.

    Args:
        settings: learning rate, betas, weight decay and epsilon, which it shares with Adam.

    Raises:
        ConfigError: prodigyopt is not installed.
    """
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ConfigError(
            "--optimizer prodigy: prodigyopt is not installed; pip install -c constraints.txt '.[optim]'"
        ) from error
    if has_no_storage(parameters[0]):
        return CountedProdigy(parameters, settings)
    with redirect_stdout(None):  # on every rank it tells of --prodigy_decouple
        optimizer: torch.optim.Optimizer = Prodigy(
            parameters,
            **settings,
            beta3=config.prodigy_beta3,
            decouple=config.prodigy_decouple,
            use_bias_correction=config.prodigy_use_bias_correction,
            safeguard_warmup=config.prodigy_safeguard_warmup,
        )
    return optimizer
