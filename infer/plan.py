"""`python -m infer.plan`: see `--help` and docs/infer_memory.md."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from infer.config import InferConfig
from infer.lora import Lora, check_together
from infer.memory import PRESETS, Levers, combine
from infer.published import GUIDE, PUBLISHED
from infer.recipes import choose_bucket, first_facts
from shared.config import parse_config
from shared.errors import ConfigError, LoraError, ModelError, run_command
from shared.lora import LoraFacts
from shared.prompt_file import PromptRow

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
    """Count what inference will hold, before there is a GPU: the run's flags, and those at the end.

    Each preset is counted, or the one that is given. Without a LoRA and a checkpoint all five published checkpoints
    are, at their own sizes. Flags that change no memory are taken and not looked at: put .plan behind a run's infer.
    """

    PLAN: ClassVar[str] = "Plan"
    rank: int = 0
    """Rank of a LoRA that is not there yet, at least 0; 0: none."""
    json: bool = False
    """Print one JSON object in place of a table; in bytes."""

    def __post_init__(self) -> None:  # a plan needs no prompt
        if isinstance(self.lora, str):
            object.__setattr__(self, "lora", (self.lora,))
        self.check_numbers()
        if self.recipe is not None:
            raise ConfigError(f"--recipe {self.recipe}: a plan reads none; give the flags that made the video")
        if self.rank < 0:
            raise ConfigError(f"--rank {self.rank}; must be at least 0")
        if self.rank and self.lora:
            raise ConfigError(
                f"--rank {self.rank} with --lora {self.lora[0]}, whose file says it; leave one of them out"
            )


def main(argv: list[str]) -> int:
    """Print the plan."""
    config = parse_config(PlanConfig, argv, "python -m infer.plan")
    rows = _rows(config)  # mistakes are told before torch loads
    loras = [Lora.read(told, config.cache_dir) for told in config.lora]
    check_together(loras, base_is_given=config.pretrained_model_name_or_path is not None)
    checkpoints = _checkpoints(config, first_facts(loras))
    from infer.forecast import forecast  # late: --help and a typo are answered at once

    counted = []
    for checkpoint in checkpoints:
        work = _work(config, checkpoint, loras)
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


def _checkpoints(config: PlanConfig, facts: LoraFacts | None) -> list[Checkpoint]:
    """What to count: the checkpoint that is given, else the LoRAs', else all that are published."""
    name, revision, variant = config.pretrained_model_name_or_path, config.revision, config.variant
    if name is None and config.lora:
        if facts is None:
            raise LoraError(
                f"{config.lora[0]}: does not say what it was trained on; give --pretrained_model_name_or_path"
            )
        name, revision, variant = facts.base_model, revision or facts.revision, variant or facts.variant
    if name is None:
        return list(PUBLISHED)
    from shared.models import open_checkpoint

    return [open_checkpoint(name, revision=revision, variant=variant, cache_dir=config.cache_dir, weights=())]


def _work(config: PlanConfig, checkpoint: Checkpoint, loras: list[Lora]) -> Work:
    """What to count: the largest of the videos that are asked for."""
    from infer.forecast import Work

    facts = first_facts(loras)
    rows = config.rows() if config.prompts else [PromptRow("")]
    buckets = [choose_bucket(row, config, checkpoint, facts) for row in rows]
    return Work(
        max(buckets, key=lambda one: one.frames * one.height * one.width),
        _dtype(config, checkpoint, "transformer", facts.dtype if facts else None),
        _dtype(config, checkpoint, "text_encoder", facts.text_dtype if facts else None),
        guided=config.guidance_scale > 1,
        rank=config.rank or sum(lora.rank for lora in loras),
        videos=config.batch_size,
        encodes_text=config.cache is None,
    )


def _dtype(config: PlanConfig, checkpoint: Checkpoint, part: str, trained: str | None) -> str:
    """The dtype of a part: the weights that tell it need not be here, and are then taken to be bfloat16."""
    if config.dtype != "auto" or trained:
        return trained if config.dtype == "auto" and trained else config.dtype
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
        "videos": work.videos,
        "rank": work.rank,
        "dtype": work.dtype,
        "peak_device_bytes": max(peaks.values()),
        "phases": peaks,
        "guide_gb": GUIDE.get(checkpoint.name, {}).get(kind),
    }


def _line(row: dict[str, Any], *, is_first: bool) -> str:
    head = ""
    if is_first:
        head = f"{row['checkpoint']}  {row['bucket']}  {row['dtype']}"
        head += f"  {row['videos']} at once" * (row["videos"] > 1) + f"  LoRA of rank {row['rank']}" * (row["rank"] > 0)
        head += "\n"
        head += "".join(f"{word:>10}" for word in ("GB", "peak", *row["phases"], "guide")) + "\n"
    figures = [row["peak_device_bytes"] / GB, *(size / GB for size in row["phases"].values())]
    guide = "" if row["guide_gb"] is None else f"{row['guide_gb']:>10.1f}"
    return f"{head}{row['preset']:>10}" + "".join(f"{figure:>10.2f}" for figure in figures) + guide


if __name__ == "__main__":
    run_command(main)
