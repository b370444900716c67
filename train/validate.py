"""`python -m train.validate RUN`: the validation videos of a run's checkpoints, from another process or machine.

It reads the run's config.json and rows, and makes, for each checkpoint that has none, the videos that the trainer would
make. What the run started from may lie elsewhere here: --cache, --pretrained_model_name_or_path.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from shared.cache import Cache
from shared.config import parse_config
from shared.console import say
from shared.dataset import DataSet, open_dataset
from shared.errors import CheckpointError, ConfigError, run_command
from shared.lora import FILE_NAME, read_metadata
from shared.models import open_checkpoint
from shared.prompt_file import PromptRow
from train.config import TrainConfig
from train.validation import make_videos, videos_of
from train.validation_rows import FOLDER, check_rows, choose_rows, store_rows, stored_rows

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ValidateConfig:
    """Make the validation videos of a run's checkpoints that have none."""

    run: Positional[str]
    """The run's --output_dir."""
    watch: bool = False
    """Stay, and make those of each checkpoint that comes, until Ctrl-C."""
    poll: float = 10.0
    """Seconds between two looks for a new checkpoint."""
    cache: str | None = None
    """The cache, where it is not where the run had it: another machine."""
    pretrained_model_name_or_path: str | None = None
    """The checkpoint that the run fine-tunes, where it is not where the run had it: a folder or a hub id."""

    def __post_init__(self) -> None:
        if not self.poll > 0:
            raise ConfigError(f"--poll {self.poll}; must be above 0 seconds")


def main(argv: list[str]) -> int:
    """Make videos, and say of which checkpoints."""
    config = parse_config(ValidateConfig, argv, "python -m train.validate")
    told = read_config(Path(config.run))
    told = replace(told, output_dir=config.run, cache=config.cache or told.cache)
    dataset = open_dataset(Cache(told.cache), told.datasets[0][0])
    if not dataset.info["validation_prompts"]:
        raise ConfigError(f"{config.run}: its data set has no validation prompts; run stage 1 with --validation_prompt")
    try:
        return _make_missing(config, told, dataset)
    except KeyboardInterrupt:
        if not config.watch:
            raise
        return 0  # as --watch says that it ends


def _make_missing(config: ValidateConfig, told: TrainConfig, dataset: DataSet) -> int:
    """Make the videos of checkpoints that have none; with `--watch` for ever."""
    from train.checkpoint import list_checkpoints, step_of  # late: mistakes are answered before torch loads

    output_dir = Path(config.run)
    rows, words = list[PromptRow](), list[str]()
    tried: set[int] = set()
    while True:
        for checkpoint in list_checkpoints(output_dir):
            step = step_of(checkpoint)
            if step not in tried and not videos_of(output_dir / FOLDER / f"step-{step}"):
                if not rows:
                    rows, words = open_rows(told, dataset, checkpoint, config.pretrained_model_name_or_path)
                videos = make_videos(told, dataset, rows, checkpoint, step, *words)
                say("videos", f"{len(videos)} of step {step}, in {output_dir / FOLDER / f'step-{step}'}")
            tried.add(step)
        if not config.watch:
            return 0
        time.sleep(config.poll)


def open_rows(
    told: TrainConfig, dataset: DataSet, checkpoint: Path, model: str | None
) -> tuple[list[PromptRow], list[str]]:
    """The rows that a run has written, else those that it would have; checked as before its first step.

    Args:
        checkpoint: of the run.
        model: `--pretrained_model_name_or_path`.

    Returns:
        The rows, and what stage 3 is to be told beside them.

    Raises:
        UserError: one that could not be made, as training would say it.
    """
    lora = read_metadata(checkpoint / FILE_NAME)[1]
    if lora is None:
        raise CheckpointError(f"{checkpoint / FILE_NAME}: does not say what it was trained on; give a run's folder")
    base = open_checkpoint(
        model or lora.base_model,
        revision=None if model else lora.revision,
        variant=None if model else lora.variant,
        cache_dir=told.cache_dir,
        weights=(),
    )
    rows = stored_rows(Path(told.output_dir))
    if rows is None:
        rows = choose_rows(told, dataset, base, lora, makes_videos=True)
        rows = store_rows(Path(told.output_dir), rows, dataset.cache)
    else:
        check_rows(told, rows, dataset, base, lora, makes_videos=True)
    return rows, ["--pretrained_model_name_or_path", base.name] if model else []


def read_config(run: Path) -> TrainConfig:
    """What a run was told.

    Raises:
        CheckpointError: the folder is no run's.
    """
    try:
        told: dict[str, Any] = json.loads((run / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run}: has no {CONFIG_FILE} of a run ({error}); give a run's --output_dir") from error
    known = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in told.items() if name in known})


if __name__ == "__main__":
    run_command(main)
