"""Trackers: wandb, tensorboard, comet_ml and trackio are given what metrics.jsonl and holdout.jsonl hold.

accelerate starts and stops them on the main process. A row of metrics.jsonl becomes the scalars of one step; what a
row does not say (null, or the column of a later version) is left out, not logged as 0.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.config import to_dict
from shared.errors import ConfigError
from train.curves import QUARTILES, by_quartile
from train.record import row_digest

if TYPE_CHECKING:
    from train.run import Run

TRACKERS = ("wandb", "tensorboard", "comet_ml", "trackio")
SCALARS = (
    "loss", "lr", "grad_norm", "lora_norm", "seconds", "data_seconds", "forward_seconds", "backward_seconds",
    "optimizer_seconds",
)  # fmt: skip


def chosen_trackers(report_to: str) -> list[str]:
    """The trackers that `--report_to` stands for; `all`: those that are installed.

    Raises:
        ConfigError: it is not installed, or none is.
    """
    if report_to == "none":
        return []
    if report_to == "all":
        chosen = [name for name in TRACKERS if is_installed(name)]
        if not chosen:
            raise ConfigError(
                "--report_to all: no tracker is installed; run `pip install '.[trackers]' -c constraints.txt` in the "
                "checkout, or give none"
            )
        return chosen
    if not is_installed(report_to):
        extra = "." if report_to == "wandb" else "'.[trackers]'"  # wandb is there unless it was taken away
        raise ConfigError(
            f"--report_to {report_to}: it is not installed; run `pip install {extra} -c constraints.txt` in the "
            "checkout, or give another"
        )
    return [report_to]


def is_installed(name: str) -> bool:
    """Whether a distribution of that name is; a folder `wandb` in the current one is not taken for the package."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def start_trackers(run: Run) -> None:
    """Start what `--report_to` names. Files go into the output folder's `--logging_dir`."""
    if run.config.report_to == "none":
        return
    folder = run.output_dir / run.config.logging_dir
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in to_dict(run.config).items() if value is not None}  # tensorboard takes none
    run.accelerator.init_trackers(run.config.tracker_name, config=given, init_kwargs=_settings(folder, run.first_step))


def _settings(folder: Path, first_step: int) -> dict[str, dict[str, Any]]:
    return {
        "wandb": {"dir": str(folder)},
        "tensorboard": {"purge_step": first_step + 1},  # the steps that a run takes again are shown once
    }


def track_step(run: Run, row: dict[str, Any]) -> None:
    """Give the trackers a row of metrics.jsonl."""
    if run.config.report_to != "none":
        run.accelerator.log(step_scalars(row), step=row["step"])


def track_holdout(run: Run, row: dict[str, Any]) -> None:
    """Give the trackers a row of holdout.jsonl."""
    if run.config.report_to != "none":
        run.accelerator.log(holdout_scalars(row), step=row["step"])


def track_videos(run: Run, videos: list[Path], step: int) -> None:
    """Show the trackers validation videos. Of those that play none, tensorboard has first, middle and last frames.

    A row of validation has one name at all steps, so that its videos are shown as one that changes.
    """
    if run.config.report_to == "none" or not videos:
        return
    for tracker in run.accelerator.trackers:
        if tracker.name == "wandb":
            import wandb

            shown = {_shown_as(video): wandb.Video(str(video), format="mp4") for video in videos}
            tracker.log(shown, step=step)
        elif tracker.name == "trackio":
            import trackio

            tracker.log({_shown_as(video): trackio.Video(str(video), format="mp4") for video in videos}, step=step)
        elif tracker.name == "comet_ml":
            for video in videos:
                tracker.writer.log_video(str(video), name=_shown_as(video), step=step)
        elif tracker.name == "tensorboard":
            for video in videos:
                tracker.writer.add_images(_shown_as(video), _some_frames(video), step, dataformats="NHWC")


def _shown_as(video: Path) -> str:
    """The prompt, seed and digest of a row of validation."""
    recipe = json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))
    slug = re.sub(r"\W+", "-", recipe["prompt"].lower())[:40].strip("-")
    return f"validation/{slug}-seed{recipe['seed']}-{row_digest(recipe)}"


def _some_frames(video: Path) -> np.ndarray:
    """The first, middle and last frame [3, H, W, 3], uint8 RGB."""
    import av

    with av.open(str(video)) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    return np.stack([frames[0], frames[len(frames) // 2], frames[-1]])


def step_scalars(row: dict[str, Any]) -> dict[str, float]:
    """What trackers are told of a row of metrics.jsonl: finite numbers only.

    Returns:
        its scalars, `samples_per_second`, and `loss_t<from>_<to>`, the mean loss of the step's samples in each quartile
        of the timesteps that it has samples of.
    """
    scalars = {name: float(row[name]) for name in SCALARS if row.get(name) is not None}
    if row.get("samples") and row.get("seconds"):
        scalars["samples_per_second"] = len(row["samples"]) / row["seconds"]
    for (first, last), losses in zip(QUARTILES, by_quartile(row), strict=True):
        if losses:
            scalars[f"loss_t{first}_{last}"] = sum(losses) / len(losses)
    return scalars


def holdout_scalars(row: dict[str, Any]) -> dict[str, float]:
    """What trackers are told of a row of holdout.jsonl: `holdout_loss`, and that of each quartile of the timesteps."""
    told = [("holdout_loss", row.get("loss"))]
    told += [
        (f"holdout_loss_t{first}_{last}", loss)
        for (first, last), loss in zip(QUARTILES, row.get("quartiles") or (), strict=False)
    ]
    return {name: float(value) for name, value in told if value is not None}
