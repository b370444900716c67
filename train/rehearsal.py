"""Before the first step: the largest bucket, forward and backward, so that memory runs out at once and not in an hour.

Nothing of it stays: no optimizer step is taken, gradients are dropped, and no generator of the run is drawn from. What
the optimizer will hold is not there yet, and is stood in for. On a GPU only: a CPU's memory is not what runs out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from shared.console import say
from shared.errors import ConfigError
from shared.geometry import Bucket
from shared.models import Checkpoint, open_checkpoint
from train.forecast import Forecast, batch_of, forecast
from train.ladder import GIB, advise, flags_of, room, rungs
from train.objective import batch_loss
from train.optim import gathered
from train.run import Run


def is_needed(device: torch.device) -> bool:
    """Whether a run on this device is rehearsed."""
    return device.type == "cuda"


def rehearse(run: Run) -> None:
    """Try the largest bucket, on every rank alike; the main one prints what was measured beside what was planned.

    Raises:
        ConfigError: the device's memory ran out; says what the plan needs, and what to add.
    """
    bucket = largest_bucket(run)
    device = run.accelerator.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        _forward_and_backward(run, bucket)
    except torch.OutOfMemoryError as error:
        raise ConfigError(_too_large(run, bucket)) from error
    finally:
        for parameter in gathered(run.state.optimizer):
            parameter.grad = None
    if run.is_main:
        measured = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)] if on_gpu else []
        told = "".join(
            f", {size / GIB:.2f} {name}" for name, size in zip(("allocated", "reserved"), measured, strict=False)
        )
        planned = forecast(run.config, _checkpoint(run), bucket, run.dtype)
        say("memory", f"{bucket}: {planned.device.total / GIB:.2f} GiB planned{told}")


def largest_bucket(run: Run) -> Bucket:
    """That of most latents, of all that the run has clips of."""

    def latents(bucket: Bucket) -> int:
        frames, height, width = bucket.latent_shape
        return frames * height * width

    return max(map(Bucket.parse, run.samples.bucket_names), key=latents)


def _forward_and_backward(run: Run, bucket: Bucket) -> None:
    batch = batch_of(run.deal.batch_size, run.facts, bucket).to(run.accelerator.device)
    state = _state_to_come(run)
    run.visit.see(run.first_step, batch.places)
    with run.accelerator.autocast():
        each = batch_loss(run.model, batch, run.facts, run.schedule, run.dtype)
    run.accelerator.backward(each.sum())
    del state


def _state_to_come(run: Run) -> list[torch.Tensor]:
    """As many bytes as the optimizer will take of the device at its first step."""
    if run.config.optimizer_offload or run.state.optimizer.state:
        return []
    dtype = torch.uint8 if run.config.use_8bit_adam else torch.float32
    copies = 4 if run.config.optimizer == "prodigy" else 2  # two moments; a sum and where it began
    return [torch.empty_like(one, dtype=dtype) for one in gathered(run.state.optimizer) for _ in range(copies)]


def _checkpoint(run: Run) -> Checkpoint:
    """The base model's configs."""
    lora = run.lora
    return open_checkpoint(
        lora.base_model,
        revision=lora.revision,
        variant=lora.variant,
        cache_dir=run.config.cache_dir,
        weights=(),
    )


def _too_large(run: Run, bucket: Bucket) -> str:
    """What to say where memory ran out."""
    device, config, checkpoint = run.accelerator.device, run.config, _checkpoint(run)

    def count(changes: dict[str, Any]) -> Forecast:
        return forecast(replace(config, **changes), checkpoint, bucket, run.dtype)

    planned = count({}).device.total
    told = f"{bucket}: the memory of {device} ran out; a step holds {planned / GIB:.2f} GiB by the plan"
    ladder = rungs(config, run.accelerator.mixed_precision, run.accelerator.num_processes)
    if device.type == "cuda":  # what others hold of it is not to be had
        free, total = torch.cuda.mem_get_info(device)
        own = torch.cuda.memory_reserved(device)
        told += f", {(free + own) / GIB:.2f} of {total / GIB:.2f} GiB are to be had"
        limit = room(free + own)
    else:
        limit = room(planned)
    found = advise(ladder, min(limit, planned - 1), count)
    if found is None:
        return f"{told}; no lever that keeps the numbers is enough: encode smaller buckets, or lower --rank"
    return f"{told}; add {flags_of(found[0])}: {found[1].device.total / GIB:.2f} GiB"
