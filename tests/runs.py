"""Folders as runs leave them, made without training: plausible curves, checkpoints, validation videos."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shared.config import to_dict
from shared.lora import LoraFacts
from tests.conftest import write_video
from train.config import TrainConfig

FACTS = LoraFacts(
    base_model="THUDM/CogVideoX-5b", revision=None, variant=None, kind="5b", rank=64, alpha=64.0,
    target_modules=["to_q", "to_k", "to_v", "to_out.0"], dataset="ridges", dataset_digest="9f31c08a77d2" * 5,
    id_token="RDG", seed=42, step=2000, dtype="bfloat16", text_dtype="bfloat16", cache_dtype="float16", frames=49,
    height=480, width=720, fps=8.0,
)  # fmt: skip


def plausible_rows(
    seed: int, steps: int, *, floor: float = 0.12, rate: float = 1e-4, batch: int = 4, skipped: tuple[int, ...] = ()
) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl: losses that fall and scatter, warm-up, spikes of gradients, a slow read now and then."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        timesteps = rng.permutation((np.arange(batch) * 1000 + rng.integers(0, 1000, batch)) // batch)
        level = (floor + 0.1 * math.exp(-step / 420)) * (2.6 * np.exp(-timesteps / 260) + 0.35)
        losses = level * np.exp(rng.normal(0, 0.28, batch))
        warm = min(1.0, step / 100)
        seconds = {
            "data_seconds": 0.012 + (0.6 if rng.random() < 0.01 else 0) + 0.01 * rng.random(),
            "forward_seconds": 1.31 + 0.05 * rng.random(),
            "backward_seconds": 2.44 + 0.09 * rng.random(),
            "optimizer_seconds": 0.11 + 0.01 * rng.random(),
        }
        gradient = (0.35 + 0.9 * math.exp(-step / 200)) * math.exp(rng.normal(0, 0.25))
        is_skipped = step in skipped
        rows.append(
            {
                "step": step,
                "epoch": step // 150,
                "loss": None if is_skipped else float(losses.mean()),
                "lr": rate * warm * 0.5 * (1 + math.cos(math.pi * step / 2000)),
                "grad_norm": None if is_skipped else gradient * (9 if rng.random() < 0.004 else 1),
                "lora_norm": 11.3 + 4 * math.log1p(step / 160) * rate / 1e-4 if step % 10 == 0 else None,
                "seconds": round(sum(seconds.values()) + 0.03, 6),
                **{name: round(value, 6) for name, value in seconds.items()},
                "samples": [f"clip-{rng.integers(600):04d}" for _ in range(batch)],
                "timesteps": timesteps.tolist(),
                "losses": [None] * batch if is_skipped else losses.tolist(),
                "skipped": is_skipped,
            }
        )
    return rows


def plausible_holdout(seed: int, steps: int, *, floor: float, climbs: float = 0.0) -> list[dict[str, Any]]:
    """Rows of holdout.jsonl: every 100 steps, from 0 on."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(0, steps + 1, 100):
        level = floor + 0.1 * math.exp(-step / 420) + climbs * max(0, step - 1000) / 1000
        quartiles = [level * (2.6 * math.exp(-(125 + 250 * number) / 260) + 0.35) for number in range(4)]
        quartiles = [value * (1 + rng.normal(0, 0.004)) for value in quartiles]
        rows.append({"step": step, "loss": sum(quartiles) / 4, "quartiles": quartiles, "samples": 24})
    return rows


def write_run(
    folder: Path,
    rows: list[dict[str, Any]],
    holdout: list[dict[str, Any]] | None = None,
    facts: LoraFacts | None = None,
    **flags: Any,
) -> Path:
    """Write a run's folder; its LoRA stands for the end of the run when there are facts."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "metrics.jsonl", rows)
    if holdout is not None:
        write_rows(folder / "holdout.jsonl", holdout)
    config = replace(TrainConfig(), output_dir=str(folder), **flags)
    (folder / "config.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    if facts is not None:
        write_lora(folder, facts)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """JSON lines."""
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


def write_lora(folder: Path, facts: LoraFacts) -> None:
    """A LoRA file with facts, and one small matrix."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    matrix = {"transformer.block.to_q.lora_A.weight": np.ones((2, 2), np.float32)}
    save_file(matrix, folder / "pytorch_lora_weights.safetensors", {"latentreel": json.dumps(to_dict(facts))})


def write_validation(run: Path, step: int, name: str, prompt: str, seed: int, hue: int = 0) -> Path:
    """A validation video with its recipe beside it: a soft light that moves over a ridge."""
    folder = run / "validation" / f"step-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"prompt": prompt, "effective_prompt": f"RDG {prompt}", "seed": seed, "num_inference_steps": 50}
    (folder / f"{name}.json").write_text(json.dumps(recipe), encoding="utf-8")
    return write_video(folder / f"{name}.mp4", ridge(hue, sharp=min(1.0, step / 2000)), codec="libx264")


def ridge(hue: int, sharp: float, frames: int = 9, height: int = 160, width: int = 240) -> np.ndarray:
    """Frames [F, H, W, 3]: hills under a sky, the sharper the further a run has come."""
    rows, columns = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    clip = np.empty((frames, height, width, 3), np.uint8)
    tint = np.array([[70, 110, 160], [170, 90, 70], [90, 140, 90]])[hue % 3]
    for number in range(frames):
        sun = np.exp(-(((columns - 0.2 - 0.06 * number) ** 2) + (rows - 0.3) ** 2) * 60)[..., None]
        image = (tint + 60) * (1 - rows[..., None] * 0.5) + 150 * sun
        for layer, base in enumerate((0.5, 0.64, 0.8)):
            edge = base + 0.07 * np.sin(columns * (7 + 5 * layer) + 0.1 * number + layer) + 0.02 * np.sin(columns * 41)
            cover = 1 / (1 + np.exp(-(rows - edge) * (8 + 180 * sharp)))[..., None]
            image = image * (1 - cover) + (tint * (0.75 - 0.22 * layer)) * cover
        clip[number] = image.clip(0, 255)
    return clip
