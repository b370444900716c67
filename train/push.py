"""`python -m train.push`: see `--help` and docs/handing_over.md."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from shared.config import parse_config, secret
from shared.console import say
from shared.errors import run_command


@dataclass(frozen=True)
class PushConfig:
    """Push a finished run's LoRA, its card and the videos that the card shows to the hub."""

    run: Positional[str]
    """The run: its --output_dir. A README.md in it is taken as it is."""
    hub_model_id: str | None = None
    """Repository, as owner/name; default: one named like the folder, of the token's owner."""
    hub_token: str | None = secret()
    """Token that may write there; better in HF_TOKEN or by `hf auth login`: others see command lines."""
    hub_license: str = "other"
    """Licence that a card which is not there yet names, such as apache-2.0; other points at the base model's."""


def main(argv: list[str]) -> int:
    """Push."""
    config = parse_config(PushConfig, argv, "python -m train.push")
    from shared.lora import find_lora  # late: --help and a typo are answered at once
    from train.hub import find_token, push_run

    folder = find_lora(config.run, "RUN").parent
    token = find_token(config.hub_token)
    say("hub", f"{push_run(folder, config.hub_model_id, token, config.hub_license, new_card=False)}")
    return 0


if __name__ == "__main__":
    run_command(main)
