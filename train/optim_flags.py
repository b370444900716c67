"""What the flags of the optimizer and of its learning rate must be to each other, known before torch is loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shared.errors import ConfigError

if TYPE_CHECKING:
    from train.config import TrainConfig

PRODIGY = ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup")

_NUMBER = r"\d+(\.\d*)?([eE][+-]?\d+)?"
STEP_RULES = re.compile(rf"({_NUMBER}:\d+,)*{_NUMBER}")  # as diffusers reads them


def check_optimizer_flags(config: TrainConfig) -> None:
    """Refuse what no optimizer takes, or not the one that was asked for.

    Raises:
        ConfigError: names the flag.
    """
    for name in ("adam_beta1", "adam_beta2", "prodigy_beta3"):
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"--{name} {value}; must be at least 0 and below 1")
    if not 0 <= config.adam_epsilon < float("inf"):
        raise ConfigError(f"--adam_epsilon {config.adam_epsilon}; must not be negative")
    if config.optimizer == "prodigy":
        for name in ("learning_rate", "adam_epsilon"):
            if not getattr(config, name) > 0:
                raise ConfigError(f"--{name} {getattr(config, name)}; must be above 0 with --optimizer prodigy")
        if config.use_8bit_adam:
            raise ConfigError("--use_8bit_adam: is of adam and adamw; leave it out with --optimizer prodigy")
    else:
        for name in PRODIGY:
            if getattr(config, name) is not None and getattr(config, name) is not False:
                raise ConfigError(f"--{name}: is of --optimizer prodigy; this is {config.optimizer}")
    if (config.lr_step_rules is None) == (config.lr_scheduler == "piecewise_constant"):
        raise ConfigError(
            f"--lr_step_rules {config.lr_step_rules}: with --lr_scheduler {config.lr_scheduler}; piecewise_constant "
            "takes rules such as 1:500,0.1:800,0.01, and no other schedule does"
        )
    if config.lr_step_rules is not None and not STEP_RULES.fullmatch(config.lr_step_rules):
        raise ConfigError(
            f"--lr_step_rules {config.lr_step_rules}; must be FACTOR:STEP with commas between and a last FACTOR, "
            "such as 1:500,0.1:800,0.01"
        )
