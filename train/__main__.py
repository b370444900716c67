"""`python -m train`, also under torchrun and `accelerate launch -m`: see `--help` and docs/training.md."""

from __future__ import annotations

from shared.config import parse_config
from shared.errors import run_command
from train.config import TrainConfig
from train.ranks import die_with_launcher
from train.trackers import chosen_trackers


def main(argv: list[str]) -> int:
    """Run stage 2."""
    die_with_launcher()
    config = parse_config(TrainConfig, argv, "python -m train")
    chosen_trackers(config.report_to)
    from train.hub import check_push  # late: --help and a typo are answered at once

    check_push(config)
    from train.loop import train

    return train(config)


if __name__ == "__main__":
    run_command(main)
