"""Checkpoints: `checkpoint-<step>/` appears by rename when it is complete, and holds all that a run goes on from.

    pytorch_lora_weights.safetensors   the LoRA, usable by stage 3 as it is; with --ema_decay the average
    last_weights.safetensors           with --ema_decay: the LoRA that the next step goes on from, as usable
    optimizer.safetensors              the optimizer's tensors
    state.json                         step, schedule, the optimizer's other values, what a run must agree on to go on
                                       from here, and the digests of the files above and of itself
Draws are functions of (seed, step, place), so that no generator has a state to save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.errors import CheckpointError
from shared.lora import FILE_NAME, LoraFacts, load_lora_state, save_lora
from shared.storage import digest_of, fsync_folder
from train.ema import Ema
from train.optim import pack_state, unpack_state
from train.optim_flags import PRODIGY

OPTIMIZER_FILE = "optimizer.safetensors"
LAST_FILE = "last_weights.safetensors"
STATE_FILE = "state.json"
FORMAT = 1

# Flags that change the numbers of a run: it is gone on from with the same values. The base model, its dtype, the global
# batch, the number of steps, the target modules and what --init_lora holds are compared as they come out, with what the
# data set says.
FIXED = (
    "seed", "rank", "lora_alpha", "caption_dropout", "timestep_sampling", "optimizer", "learning_rate", "lr_scheduler",
    "lr_warmup_steps", "lr_num_cycles", "lr_power", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "max_grad_norm",
    "base_precision", "use_8bit_adam", "captions", "drop_last",
    "noised_image_dropout", "image_factor", "drop_learned_positions",
    "use_rslora", "use_dora", "lora_dropout", "ema_decay", "loss_weighting", "min_snr_gamma", "min_snr_floor",
    "scale_lr", "lr_step_rules", "allow_tf32", *PRODIGY,
)  # fmt: skip


@dataclass(frozen=True)
class RunState:
    """What a step changes: the LoRA in the transformer and its average, the optimizer, learning rate, loss scale."""

    transformer: Any
    optimizer: torch.optim.Optimizer
    schedule: Any
    scaler: Any | None
    ema: Ema | None = None


def save_result(run: RunState, folder: Path, lora: LoraFacts) -> Path:
    """Write the LoRA that a run has come to: the average where it keeps one, else the last weights."""
    with run.ema.applied() if run.ema else nullcontext():
        return save_lora(run.transformer, folder, lora)


def save_checkpoint(output_dir: Path, step: int, run: RunState, lora: LoraFacts, position: dict[str, Any]) -> Path:
    """Write `checkpoint-<step>`; an older folder of that name is replaced.

    Args:
        position: what tells whether a checkpoint belongs to a run: data set version, global batch, flags.
    """
    from safetensors.torch import save_file

    final = output_dir / f"checkpoint-{step}"
    building = output_dir / f".checkpoint-{step}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    names = [save_result(run, building, lora).name, OPTIMIZER_FILE]
    if run.ema:
        names.append(save_lora(run.transformer, building, lora, LAST_FILE).name)
    tensors, packed = pack_state(run.optimizer)
    save_file(tensors, building / OPTIMIZER_FILE)
    state = {
        "format": FORMAT,
        "step": step,
        "position": position,
        "optimizer": packed,
        "schedule": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict() if run.scaler else None,
        "files": {name: _sha256(building / name) for name in names},
    }
    state = {**state, "sha256": digest_of(state).hex()}
    (building / STATE_FILE).write_text(json.dumps(state, indent=2), encoding="utf-8")
    for file in building.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    fsync_folder(building)
    if final.exists():
        _remove(final)
    building.rename(final)
    fsync_folder(output_dir)
    return final


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if step_of(folder) >= 0 and folder.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder; -1: it is none."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else -1


def rotate_checkpoints(output_dir: Path, limit: int | None) -> None:
    """Remove the oldest checkpoints until `limit` are left, and what a killed run left of one."""
    for remains in output_dir.glob(".checkpoint-*"):
        shutil.rmtree(remains)
    for folder in list_checkpoints(output_dir)[: -limit if limit else 0]:
        _remove(folder)


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints after `step` to `aside-checkpoint-<step>`: a run that goes on from `step` has not made them.

    Returns:
        Where they are now.
    """
    aside = []
    for folder in list_checkpoints(output_dir):
        if step_of(folder) > step:
            target = folder.with_name(f"aside-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            aside.append(folder.rename(target))
    return aside


def _remove(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.old")  # never half a checkpoint under its name
    shutil.rmtree(doomed, ignore_errors=True)
    shutil.rmtree(folder.rename(doomed))


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint whose files are whole.

    Raises:
        CheckpointError: a file is missing, torn or of another format; names the checkpoint before it.
    """
    before = [other for other in list_checkpoints(folder.parent) if step_of(other) < step_of(folder)]
    advice = f"; resume from {before[-1]}" if before else "; start anew in another --output_dir"
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: torn or not a checkpoint ({error}){advice}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"{folder}: not a checkpoint of format {FORMAT}{advice}")
    told = state.pop("sha256", None)
    if told != digest_of(state).hex():
        raise CheckpointError(f"{folder / STATE_FILE}: has changed since it was written{advice}")
    for name, digest in state["files"].items():
        try:
            found = _sha256(folder / name)
        except OSError as error:
            raise CheckpointError(f"{folder}: torn or not a checkpoint ({error}){advice}") from error
        if found != digest:
            raise CheckpointError(f"{folder / name}: has changed since it was written{advice}")
    return state


def check_position(folder: Path, state: dict[str, Any], position: dict[str, Any]) -> None:
    """Refuse to go on from a checkpoint of another run.

    Raises:
        CheckpointError: names the first field that differs, with both values.
    """
    for name, value in position.items():
        was = state["position"].get(name)
        if was != value:
            raise CheckpointError(
                f"{folder}: {name} was {was!r} and is now {value!r}; "
                "resume with what it was, or start anew in another --output_dir"
            )


def load_checkpoint(folder: Path, state: dict[str, Any], run: RunState) -> None:
    """Give a run the state of a checkpoint that `read_state` has read."""
    from safetensors.torch import load_file

    with run.ema.applied() if run.ema else nullcontext():
        load_lora_state(run.transformer, folder / FILE_NAME)
    if run.ema:
        load_lora_state(run.transformer, folder / LAST_FILE)
    unpack_state(run.optimizer, load_file(folder / OPTIMIZER_FILE), state["optimizer"])
    run.schedule.load_state_dict(state["schedule"])
    if run.scaler and state["scaler"]:
        run.scaler.load_state_dict(state["scaler"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
