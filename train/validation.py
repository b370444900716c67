"""Validation videos: stage 3 makes them, in a process of its own, and whatever it does training goes on.

    OUTPUT/validation/step-<n>/prompts.jsonl                   what stage 3 was asked for, a row a video
    OUTPUT/validation/step-<n>/<name>.mp4 and <name>.json     the video, and the recipe that makes it again
    OUTPUT/validation/step-<n>/log.txt                         what stage 3 said

The prompts' embeddings are in the cache (train/validation_rows.py), and T5 is not loaded. The videos are those that
`python -m infer` makes of the checkpoint later, to the last bit on a CPU.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from shared.console import warn
from shared.prompt_file import PromptRow, prompt_lines
from shared.storage import write_atomically
from train.config import TrainConfig
from train.validation_rows import FILE, FOLDER, seeded

if TYPE_CHECKING:
    from shared.dataset import DataSet

CHECKOUT = Path(__file__).resolve().parent.parent
POLL_S = 0.2  # seconds between two looks at whether the run is to stop
LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # of this process: stage 3 would take itself for one of several
# `python -m infer`, which ends with the process that started it.
CHILD = """
import runpy
from shared.processes import die_with_parent
die_with_parent()
runpy.run_module("infer", run_name="__main__", alter_sys=True)
"""


def is_due(config: TrainConfig, step: int, steps_per_epoch: int) -> bool:
    """Whether videos are to be made after a step; step 0 is before the first."""
    if step == 0:
        return config.validate_first
    steps = config.validation_steps or (config.validation_epochs or 0) * steps_per_epoch
    return bool(steps) and step % steps == 0


def infer_flags(config: TrainConfig, dataset: DataSet, prompts: Path, checkpoint: Path, folder: Path) -> list[str]:
    """What stage 3 is told, but for what the rows say themselves. All paths are absolute.

    Args:
        dataset: whose prompts they are.
        prompts: a file of rows.
    """
    told = {
        "lora": checkpoint.resolve(),
        "prompts": prompts.resolve(),
        "output_dir": folder.resolve(),
        "cache": dataset.cache.url,
        "dataset": dataset.name,
        "num_inference_steps": config.validation_inference_steps,
        "guidance_scale": config.guidance_scale,
    }
    if config.cache_dir is not None:
        told["cache_dir"] = Path(config.cache_dir).expanduser().resolve()
    words = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    return [*words, "--use_dynamic_cfg"] if config.use_dynamic_cfg else words


def make_videos(
    config: TrainConfig,
    dataset: DataSet,
    rows: list[PromptRow],
    checkpoint: Path,
    step: int,
    *more: str,
    stopping: Callable[[], bool] = lambda: False,
) -> list[Path]:
    """Have stage 3 make the videos of a checkpoint. Returns those that are there; says why where some are not.

    Args:
        rows: of `store_rows`.
        more: words for stage 3.
        stopping: whether the run was asked to stop meanwhile: it does not wait for the rest of them then.
    """
    folder = Path(config.output_dir) / FOLDER / f"step-{step}"
    prompts, log_path = folder / FILE, folder / "log.txt"
    words = [*infer_flags(config, dataset, prompts, checkpoint, folder), *more]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(prompts, prompt_lines(seeded(config, rows)))
        with log_path.open("w", encoding="utf-8") as log:
            why = _run([sys.executable, "-c", CHILD, *words], log, config.validation_timeout, stopping)
    except OSError as error:  # a disk that stage 3 has filled
        why = f"could not be started ({error})"
    if why and stopping():
        warn(f"validation of step {step}: stage 3 {why}, as the run was asked to stop")
    elif why:
        warn(f"validation of step {step}: stage 3 {why}; see {log_path}; training goes on")
    return videos_of(folder)


def videos_of(folder: Path) -> list[Path]:
    """The videos of a step that are whole: stage 3 writes a recipe once its video stands."""
    made = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [path.with_suffix(".mp4") for path in made if path.with_suffix(".mp4").is_file()]


def _run(command: list[str], log: TextIO, timeout: float, stopping: Callable[[], bool] = lambda: False) -> str | None:
    """Run a command to its end. Returns what was wrong, if anything was; an OSError is raised where it cannot start."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    until = time.monotonic() + timeout
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        while (left := until - time.monotonic()) > 0 and not stopping():
            try:
                status = process.wait(min(left, POLL_S))
            except subprocess.TimeoutExpired:
                continue
            return f"ended with status {status}" if status else None
    finally:
        if process.poll() is None:  # whatever ended the waiting: nothing of it stays
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "was ended" if stopping() else f"took longer than --validation_timeout {timeout:g} s and was ended"


def forget_later(output_dir: Path, step: int) -> None:
    """Remove videos of steps that a run which goes on from `step` has not made."""
    for folder in (output_dir / FOLDER).glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdigit() and int(number) > step:
            shutil.rmtree(folder)
