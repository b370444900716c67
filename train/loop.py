"""Stage 2, the story of a run: step after step until the last one, and a checkpoint now and then."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from types import FrameType

import torch
from tqdm import tqdm

from shared.config import to_dict
from shared.lora import save_lora, trainable
from train.checkpoint import rotate_checkpoints, save_checkpoint, set_aside_later
from train.config import TrainConfig
from train.data import Requests, micro_batches
from train.metrics import Metrics
from train.objective import Batch, batch_loss
from train.sampler import MISSING
from train.setup import Run, make_accelerator, one_run, open_run


def train(config: TrainConfig) -> int:
    """Run stage 2.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped it, after a checkpoint.

    Raises:
        UserError: a data set, checkpoint, flag or output folder that does not fit.
    """
    accelerator = make_accelerator(config)
    with one_run(config, accelerator), _stop_signals() as stop:
        run = open_run(config, accelerator)
        if run.is_main:
            print("\n".join(_introduction(run)), flush=True)
        if config.report_to != "none":
            _start_trackers(run)
        status = _take_steps(run, stop)
        accelerator.end_training()
    return status


def _start_trackers(run: Run) -> None:
    folder = run.output_dir / run.config.logging_dir
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    run.accelerator.init_trackers(
        run.config.tracker_name, config=to_dict(run.config), init_kwargs={"wandb": {"dir": str(folder)}}
    )


def _introduction(run: Run) -> Iterator[str]:
    lora, deal = run.lora, run.deal
    yield f"base      {lora.base_model}: {lora.kind}, {lora.dtype} on {run.accelerator.device}"
    yield f"data set  {lora.dataset}, version {lora.dataset_digest[:12]}: {len(run.samples)} clips"
    yield f"LoRA      rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}"
    yield (
        f"batches   {deal.batch_size} x {deal.ranks} processes x {deal.accumulation} accumulated = "
        f"{deal.global_batch}; {run.sampler.steps_per_epoch} steps an epoch"
    )
    yield f"steps     {run.first_step} to {run.max_steps}, into {run.output_dir}"


def _take_steps(run: Run, stop: list[int]) -> int:
    """Step from `run.first_step` to the end, or until a signal has arrived on any rank."""
    config, accelerator = run.config, run.accelerator
    steps = range(run.first_step, run.max_steps)
    requests = Requests(run.samples, run.sampler, run.deal, accelerator.process_index, steps, run.draws)
    pinned = accelerator.device.type == "cuda"
    batches = micro_batches(run.reader, requests, num_workers=config.dataloader_num_workers, pin_memory=pinned)
    if run.is_main:
        for folder in set_aside_later(run.output_dir, run.first_step):
            print(f"set aside {folder}: it is later than the checkpoint that the run goes on from")
    metrics = Metrics(run.output_dir, run.first_step) if run.is_main else None
    bar = tqdm(total=run.max_steps, initial=run.first_step, unit="step", disable=None if run.is_main else True)
    with closing(batches), closing(metrics) if metrics else nullcontext(), bar:
        for step in steps:
            row, signal_number = take_step(run, step, batches, stop)
            bar.update()
            bar.set_postfix(loss=row["loss"], lr=row["lr"])
            if metrics:
                metrics.write(row)
            if config.report_to != "none":
                accelerator.log({name: row[name] for name in ("loss", "lr", "grad_norm")}, step=row["step"])
            done = step + 1
            if metrics and (done % config.checkpointing_steps == 0 or done == run.max_steps or signal_number):
                metrics.sync()  # before the checkpoint has its name, the rows that lead to it are on the disk
                lora = replace(run.lora, step=done)
                save_checkpoint(run.output_dir, done, run.state, lora, run.position)
                rotate_checkpoints(run.output_dir, config.checkpoints_total_limit)
            if signal_number:
                if run.is_main:
                    print(f"stopped by signal {signal_number} after step {done}; its checkpoint is saved", flush=True)
                return 128 + signal_number
    if run.is_main:
        path = save_lora(run.state.transformer, run.output_dir, replace(run.lora, step=run.max_steps))
        print(f"LoRA      {path}: load it at weight 1.0, alpha is in the file")
    return 0


def take_step(run: Run, step: int, batches: Iterator[Batch], stop: list[int]) -> tuple[dict[str, object], int]:
    """One optimizer step. Returns its row of metrics.jsonl, and the signal that asks any rank to stop, or 0."""
    config, accelerator = run.config, run.accelerator
    started, data_seconds = time.perf_counter(), 0.0
    numbers = run.sampler.batch(step)
    filled = int((numbers != MISSING).sum())
    micros = run.deal.micros(numbers)

    # The loss of each place, and behind them the signal: one collective for both.
    shared = torch.zeros(run.deal.global_batch + 1, dtype=torch.float64, device=accelerator.device)
    for micro in range(micros):
        waited = time.perf_counter()
        batch = next(batches).to(accelerator.device)
        data_seconds += time.perf_counter() - waited
        is_last = micro == micros - 1
        with nullcontext() if is_last else accelerator.no_sync(run.model):
            with accelerator.autocast():
                losses = batch_loss(run.model, batch, run.facts, run.schedule, run.dtype)
            weighted = losses * batch.weights
            # DDP averages gradients over ranks: times their number, they add up to the mean over the filled places.
            accelerator.backward(weighted.sum() * run.deal.ranks / filled)
        shared[batch.places] = weighted.detach().double()

    parameters = trainable(run.state.transformer)
    grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or float("inf"))
    lr = run.state.schedule.get_last_lr()[0]
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.state.schedule.step()

    shared[-1] = len(stop)
    shared = accelerator.reduce(shared, reduction="sum").cpu()
    row = {
        "step": step + 1,
        "epoch": step // run.sampler.steps_per_epoch,
        "loss": float(shared[:-1].sum() / filled),
        "lr": lr,
        "grad_norm": float(grad_norm),
        "seconds": round(time.perf_counter() - started, 6),
        "data_seconds": round(data_seconds, 6),
        "samples": [run.samples.sample_id(int(number)) for number in numbers[:filled]],
    }
    if not shared[-1]:
        return row, 0
    return row, stop[0] if stop else signal.SIGTERM  # on whatever rank it arrived, all stop after the same step


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that a SIGTERM or SIGINT puts its number into; a second one ends the process at once."""
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if arrived:
            raise SystemExit(128 + number)
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
