"""One optimizer step, given to the device without waiting for it; and its row, once the device has caught up.

Shapes: P places of a global batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from train.objective import Batch, batch_loss, loss_weights
from train.optim import gathered, take_optimizer_step
from train.run import Run
from train.sampler import MISSING
from train.stopwatch import PHASES, Stopwatch


@dataclass(frozen=True)
class Taken:
    """A step that the device was given.

    Attributes:
        numbers: [P] the global batch.
        values: [2 P + 4] float64, on the device: the loss and the weight of each place, how many ranks were asked to
            stop, gradient norm, whether the step stands, norm of the LoRA (NaN: not asked for).
    """

    step: int
    numbers: np.ndarray
    lr: float
    values: torch.Tensor
    stopwatch: Stopwatch


def take_step(run: Run, step: int, batches: Iterator[Batch], *, stopping: bool, lora_norm: bool) -> Taken:
    """Take a step, on every rank alike; one whose loss or gradient is not finite changes nothing.

    Args:
        stopping: whether this rank was asked to stop.
        lora_norm: measure the LoRA too.
    """
    config, accelerator, deal = run.config, run.accelerator, run.deal
    stopwatch = Stopwatch(accelerator.device)
    numbers = run.sampler.batch(step)
    filled, micros = int((numbers != MISSING).sum()), deal.micros(numbers)

    shared = torch.zeros(2 * deal.global_batch + 1, dtype=torch.float64, device=accelerator.device)
    losses, weights = shared[:-1].view(2, -1)
    shared[-1] = stopping
    for micro in range(micros):
        batch = next(batches).to(accelerator.device)
        run.tell_bad(batch.skipped)
        stopwatch.lap("data")
        run.visit.see(step, batch.places)
        is_last = micro == micros - 1
        with nullcontext() if is_last else accelerator.no_sync(run.model):
            with accelerator.autocast():
                each = batch_loss(run.model, batch, run.facts, run.schedule, run.dtype)
            stopwatch.lap("forward")
            weighted = each * batch.weights * loss_weights(batch.timesteps, run.schedule, config)
            # DDP averages gradients over ranks: times their number, they add up to the mean over the filled places.
            accelerator.backward(weighted.sum() * deal.ranks / filled)
        losses[batch.places], weights[batch.places] = each.detach().double(), batch.weights.double()
        stopwatch.lap("backward")
    shared = accelerator.reduce(shared, reduction="sum")
    losses, weights = shared[:-1].view(2, -1)

    parameters = gathered(run.state.optimizer)
    if config.bad_samples == "skip":  # the mean is over those that could be read, on whatever rank
        share = filled / weights.sum()  # of none: not finite, and the step is left out
        for parameter in parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(share.to(parameter.device))
    grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or float("inf")).double().to(shared.device)
    stands = torch.isfinite(losses.where(weights > 0, 0.0).sum()) & torch.isfinite(grad_norm)
    lr = run.state.schedule.get_last_lr()[0]
    _apply(run, stands.to(parameters[0].device))
    if run.state.ema:
        run.state.ema.update(step, stands)
    run.optimizer.zero_grad()
    run.state.schedule.step()
    norm = torch.nn.utils.get_total_norm(parameters) if lora_norm else torch.tensor(math.nan)
    told = torch.stack([grad_norm, stands.double(), norm.double().to(shared.device)])
    stopwatch.lap("optimizer")
    return Taken(step, numbers, lr, torch.cat([shared, told]), stopwatch)


def _apply(run: Run, stands: torch.Tensor) -> None:
    """The optimizer's step, if it stands. Adam's fused kernels ask the device itself, so that the host need not wait.

    With a loss scaler, float16's gradients are not finite now and then: it skips the step and scales less.
    """
    if run.state.scaler is not None:
        take_optimizer_step(run.optimizer)
    elif getattr(run.state.optimizer, "_step_supports_amp_scaling", False):
        run.state.optimizer.found_inf = (~stands).float()  # type: ignore[attr-defined]
        take_optimizer_step(run.optimizer)
    elif bool(stands):
        take_optimizer_step(run.optimizer)


def settle(run: Run, taken: list[Taken]) -> tuple[list[dict[str, Any]], bool]:
    """The rows of metrics.jsonl of some steps, and whether any rank was asked to stop. Waits for the device, once."""
    values = torch.stack([one.values for one in taken]).cpu().numpy()
    return [_row(run, one, row) for one, row in zip(taken, values, strict=True)], bool(values[:, -4].any())


def _row(run: Run, taken: Taken, values: np.ndarray) -> dict[str, Any]:
    losses, weights = values[:-4].reshape(2, -1)
    counted = weights > 0
    grad_norm, stands, lora_norm = values[-3:]
    seconds = {name: round(value, 6) for name, value in taken.stopwatch.seconds().items()}
    places = np.flatnonzero(counted)
    seed = run.draws.seed
    seen = [run.samples.visited(int(taken.numbers[place]), taken.step, int(place), seed) for place in places]
    return {
        "step": taken.step + 1,
        "epoch": taken.step // run.sampler.steps_per_epoch,
        "loss": _finite(losses[counted].mean()) if len(places) else None,
        "lr": taken.lr,
        "grad_norm": _finite(grad_norm),
        "seconds": seconds[""],
        **{f"{phase}_seconds": seconds[phase] for phase in PHASES},
        "samples": [run.samples.sample_id(number) for number in seen],
        "timesteps": [run.draws.timestep(taken.step, int(place)) for place in places],
        "losses": [_finite(loss) for loss in losses[counted]],
        "lora_norm": _finite(lora_norm),
        "skipped": not stands,
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if math.isfinite(value) else None
