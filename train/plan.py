"""`python -m train.plan`: see `--help` and docs/memory.md."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from shared.config import parse_config
from shared.errors import CacheError, ModelError, run_command
from train.base import DTYPES, PRECISIONS, open_base
from train.config import TrainConfig
from train.local_cache import parse_size

if TYPE_CHECKING:
    from shared.geometry import Bucket
    from shared.models import Checkpoint
    from train.forecast import Forecast

GIB = 2**30


@dataclass(frozen=True)
class PlanConfig(TrainConfig):
    """Count what a run will hold, before there is a GPU: the run's flags, and those at the end."""

    PLAN: ClassVar[str] = "Plan"
    bucket: str | None = None
    """Buckets to count, such as 49x480x720, with commas between; default: the data set's, else the checkpoint's."""
    device_memory: str | None = None
    """Memory of the GPU, such as 12GB (10^9 bytes each) or 24GiB: what to add so that a step fits."""
    json: bool = False
    """Print one JSON object, of the bucket that needs most, in place of a table; in bytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device_memory is not None:
            parse_size(self.device_memory, "--device_memory")


def main(argv: list[str]) -> int:
    """Print the plan."""
    config = parse_config(PlanConfig, argv, "python -m train.plan")
    from train.forecast import check_countable, forecast  # late: --help and a typo are answered at once

    checkpoint, buckets = _what_to_count(config)
    dtype, notes = _dtype(config, checkpoint)
    check_countable(config, PRECISIONS[dtype])
    import torch

    run_dtype = getattr(torch, dtype)
    counted = [forecast(config, checkpoint, bucket, run_dtype) for bucket in buckets]
    largest = max(counted, key=lambda one: one.device.total)
    advised = _advised(config, checkpoint, largest, dtype)
    notes += list(largest.notes)
    if config.json:
        print(json.dumps(_record(config, counted, largest, advised, notes)))
    else:
        print(f"base      {checkpoint.name}: {checkpoint.facts.kind}, {dtype}, LoRA of rank {config.rank}")
        print("\n".join([*_table(counted), *_verdict(config, largest, advised)]))
        print("\n".join(f"note      {note}" for note in (*notes, *_left_out())))
    return 0


def _what_to_count(config: PlanConfig) -> tuple[Checkpoint, list[Bucket]]:
    """The checkpoint, and the buckets: those asked for, the data set's, or the checkpoint's own."""
    from shared.cache import Cache
    from shared.dataset import open_dataset
    from shared.geometry import Bucket
    from shared.sizes import check_bucket
    from train.check import check_flags

    asked = config.pretrained_model_name_or_path
    buckets = [Bucket.parse(text) for text in config.bucket.split(",")] if config.bucket else []
    datasets = []
    if asked is None or not buckets:
        try:
            datasets = [open_dataset(Cache(config.cache), name) for name, _ in config.datasets]
        except CacheError:
            if asked is None or config.cache != TrainConfig.cache:
                raise
    made_with = datasets[0].info["model"] if datasets else {}
    checkpoint = open_base(config, made_with, weights=())
    if not buckets and datasets:
        texts = {text for dataset in datasets for text in dataset.columns("bucket")["bucket"].to_pylist()}
        buckets = [Bucket.parse(text) for text in sorted(texts)]
    buckets = buckets or [Bucket(checkpoint.facts.sample_frames, *checkpoint.facts.native_size)]
    check_flags(config, checkpoint)
    for bucket in buckets:
        check_bucket(bucket, checkpoint.facts, checkpoint.name, drop_learned_positions=config.drop_learned_positions)
    return checkpoint, buckets


def _dtype(config: PlanConfig, checkpoint: Checkpoint) -> tuple[str, list[str]]:
    """The dtype of the frozen base, and what there is to say of it: the weights that tell it need not be here."""
    if config.mixed_precision is not None:
        return DTYPES[config.mixed_precision], []
    try:
        return checkpoint.stored_dtype("transformer"), []
    except ModelError:
        return "bfloat16", ["the weights are not here to tell their dtype: counted as --mixed_precision bf16"]


def _advised(
    config: PlanConfig, checkpoint: Checkpoint, largest: Forecast, dtype: str
) -> tuple[dict[str, Any], Forecast] | None:
    """What to add so that the largest bucket fits `--device_memory`; None: nothing need be, or can be."""
    import torch

    from train.forecast import forecast
    from train.ladder import advise, room, rungs

    if config.device_memory is None:
        return None
    limit = room(parse_size(config.device_memory))
    if largest.device.total <= limit:
        return None

    def count(changes: dict[str, Any]) -> Forecast:
        return forecast(replace(config, **changes), checkpoint, largest.bucket, getattr(torch, dtype))

    return advise(rungs(config, PRECISIONS[dtype]), limit, count)


def _table(counted: list[Forecast]) -> list[str]:
    from train.forecast import PARTS

    lines = [f"{'GiB':<16}{'device':>8}" + "".join(f"{part:>13}" for part in PARTS) + f"{'host':>9}"]
    for one in counted:
        parts = "".join(f"{one.device.parts[part] / GIB:>13.2f}" for part in PARTS)
        lines.append(f"{one.bucket!s:<16}{one.device.total / GIB:>8.2f}{parts}{one.host_bytes / GIB:>9.2f}")
    return lines


def _verdict(config: PlanConfig, largest: Forecast, advised: tuple[dict[str, Any], Forecast] | None) -> list[str]:
    from train.ladder import CONTEXT_BYTES, SHARE, flags_of, room

    if config.device_memory is None:
        return []
    limit = room(parse_size(config.device_memory))
    rule = f"{SHARE:.0%} of {config.device_memory} less {CONTEXT_BYTES / GIB:g} GiB is {limit / GIB:.2f} GiB"
    if largest.device.total <= limit:
        return [f"fits      {rule}"]
    told = [f"too large {rule}, {largest.bucket} needs {largest.device.total / GIB:.2f}"]
    if advised is None:
        return [
            *told,
            "advice    no lever that keeps the numbers is enough: give smaller buckets, a lower --rank or another GPU",
        ]
    changes, then = advised
    needs = f"{then.device.total / GIB:.2f} GiB, and {then.host_bytes / GIB:.2f} of the host"
    return [*told, f"advice    add {flags_of(changes)}: {needs}"]


def _left_out() -> list[str]:
    return [
        "one process; not counted: CUDA's context (about 0.5 GiB), workspaces of kernels, the allocator's fragments, "
        "and on the host Python and its libraries"
    ]


def _record(
    config: PlanConfig,
    counted: list[Forecast],
    largest: Forecast,
    advised: tuple[dict[str, Any], Forecast] | None,
    notes: list[str],
) -> dict[str, Any]:
    from train.ladder import flags_of, room

    limit = None if config.device_memory is None else room(parse_size(config.device_memory))
    return {
        **_figures(largest),
        "buckets": [_figures(one) for one in counted],
        "room_bytes": limit,
        "fits": None if limit is None else largest.device.total <= limit,
        "advice": None if advised is None else {"flags": flags_of(advised[0]), **_figures(advised[1])},
        "notes": notes,
    }


def _figures(one: Forecast) -> dict[str, Any]:
    from train.forecast import PARTS

    return {
        "bucket": str(one.bucket),
        "peak_device_bytes": one.device.total,
        "host_bytes": one.host_bytes,
        "breakdown": {part: one.device.parts[part] for part in PARTS},
    }


if __name__ == "__main__":
    run_command(main)
