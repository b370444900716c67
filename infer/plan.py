"""`python -m infer.plan`: see `--help` and docs/infer_memory.md."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from infer.config import InferConfig
from infer.memory import PRESETS, Levers, combine
from infer.published import GUIDE, PUBLISHED
from shared.config import parse_config
from shared.errors import ConfigError, ModelError, run_command
from shared.geometry import Bucket
from shared.sizes import check_bucket

if TYPE_CHECKING:
    from infer.forecast import Work
    from shared.models import Checkpoint

GB = 10**9  # as the guide's table
NOTES = (
    "not counted: CUDA's context (about 0.5 GB), workspaces of kernels, the allocator's fragments",
    "fp8 is counted as int8, quanto as torchao, --compile left out; of several GPUs the first of two is counted",
    "by the plan; no GPU has confirmed it",
)


@dataclass(frozen=True)
class PlanConfig(InferConfig):
    """Count what inference will hold, before there is a GPU: the run's memory flags, size and dtype, over each preset.

    Without --pretrained_model_name_or_path all five published checkpoints are counted, at their own sizes.
    """

    rank: int = 0
    """Rank of a LoRA to count with them; 0: none."""
    json: bool = False
    """Print one JSON object in place of a table; in bytes."""

    def __post_init__(self) -> None:  # a plan needs no prompt
        if self.lora:
            raise ConfigError(f"--lora {self.lora[0]}: a plan reads none; give its --rank")
        if self.rank < 0:
            raise ConfigError(f"--rank {self.rank}; must be 0 or more")


def main(argv: list[str]) -> int:
    """Print the plan."""
    config = parse_config(PlanConfig, argv, "python -m infer.plan")
    rows = _rows(config)  # mistakes are told before torch loads
    checkpoints = _checkpoints(config)
    from infer.forecast import forecast  # late: --help and a typo are answered at once

    counted = []
    for checkpoint in checkpoints:
        work = _work(config, checkpoint)
        for name, levers in rows.items():
            peaks = forecast(checkpoint, work, levers)
            counted.append(_record(checkpoint, name, work, peaks, levers))
            if not config.json:
                print(_line(counted[-1], is_first=name == next(iter(rows))), flush=True)
    if config.json:
        print(json.dumps({"rows": counted, "notes": NOTES}))
    else:
        print("\n".join(f"note  {note}" for note in NOTES))
    return 0


def _rows(config: PlanConfig) -> dict[str, Levers]:
    """The levers to count, by the name of their preset; those of the flags in each."""
    names = [config.preset] if config.preset else list(PRESETS)
    if config.device_map:
        return {"2 GPUs": combine(config, "cuda")}
    rows = {name: combine(replace(config, preset=cast(Any, name)), "cuda") for name in names}
    if config.preset is None and config.offload is None and not config.compile:
        rows["2 GPUs"] = combine(replace(config, device_map="balanced"), "cuda")
    return rows


def _checkpoints(config: PlanConfig) -> list[Checkpoint]:
    if config.pretrained_model_name_or_path is None:
        return list(PUBLISHED)
    from shared.models import open_checkpoint

    return [
        open_checkpoint(
            config.pretrained_model_name_or_path,
            revision=config.revision,
            variant=config.variant,
            cache_dir=config.cache_dir,
            weights=(),
        )
    ]


def _work(config: PlanConfig, checkpoint: Checkpoint) -> Work:
    from infer.forecast import Work

    facts = checkpoint.facts
    bucket = Bucket(
        config.num_frames or facts.sample_frames,
        config.height or facts.native_size[0],
        config.width or facts.native_size[1],
    )
    check_bucket(bucket, facts, checkpoint.name, drop_learned_positions=False)
    dtypes = [_dtype(config, checkpoint, part) for part in ("transformer", "text_encoder")]
    return Work(bucket, dtypes[0], dtypes[1], guided=config.guidance_scale > 1, rank=config.rank)


def _dtype(config: PlanConfig, checkpoint: Checkpoint, part: str) -> str:
    """The dtype of a part: the weights that tell it need not be here, and are then taken to be bfloat16."""
    if config.dtype != "auto":
        return config.dtype
    try:
        return checkpoint.stored_dtype(part)
    except ModelError:
        return "bfloat16"


def _record(checkpoint: Checkpoint, name: str, work: Work, peaks: dict[str, int], levers: Levers) -> dict[str, Any]:
    kind = "several" if levers.device_map else "int8" if levers.transformer_precision != "native" else "native"
    return {
        "checkpoint": checkpoint.name,
        "preset": name,
        "bucket": str(work.bucket),
        "dtype": work.dtype,
        "peak_device_bytes": max(peaks.values()),
        "phases": peaks,
        "guide_gb": GUIDE.get(checkpoint.name, {}).get(kind),
    }


def _line(row: dict[str, Any], *, is_first: bool) -> str:
    head = ""
    if is_first:
        head = f"{row['checkpoint']}  {row['bucket']}  {row['dtype']}\n"
        head += "".join(f"{word:>10}" for word in ("GB", "peak", *row["phases"], "guide")) + "\n"
    figures = [row["peak_device_bytes"] / GB, *(size / GB for size in row["phases"].values())]
    guide = "" if row["guide_gb"] is None else f"{row['guide_gb']:>10.1f}"
    return f"{head}{row['preset']:>10}" + "".join(f"{figure:>10.2f}" for figure in figures) + guide


if __name__ == "__main__":
    run_command(main)
