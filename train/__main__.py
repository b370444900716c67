"""`python -m train`, also under torchrun and `accelerate launch -m`: see `--help` and docs/training.md."""

from __future__ import annotations

from shared.config import parse_config
from shared.errors import run_command
from train.config import TrainConfig


def main(argv: list[str]) -> int:
    """Run stage 2."""
    config = parse_config(TrainConfig, argv, "python -m train")
    from train.loop import train  # late: --help and a typo are answered at once

    return train(config)


if __name__ == "__main__":
    run_command(main)
