"""Stage 2, the story of a run: step after step until the last one, and a checkpoint now and then."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from types import FrameType

from shared.console import say
from train.advice import advice, facts_of
from train.checkpoint import rotate_checkpoints, save_checkpoint, save_result, set_aside_later
from train.config import TrainConfig
from train.data import Requests, micro_batches
from train.holdout import held_out_loss
from train.hub import push_result
from train.log import Log
from train.off_device import off_device
from train.ranks import launcher, main_at_work
from train.rehearsal import is_needed, rehearse
from train.run import Run
from train.setup import make_accelerator, one_run, open_run
from train.step import Taken, settle, take_step
from train.trackers import start_trackers, track_videos
from train.validation import FOLDER, forget_later, is_due, make_videos


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
            for event, message in _introduction(run):
                say(event, message)
        with main_at_work(accelerator, "advice"):
            if run.is_main:
                for line in advice(config, facts_of(run)):
                    say("advice", line)
        with main_at_work(accelerator, "trackers"):
            start_trackers(run)
        if is_needed(accelerator.device):
            rehearse(run)
        status = _take_steps(run, stop)
        accelerator.end_training()
    return status


def _introduction(run: Run) -> Iterator[tuple[str, str]]:
    lora, deal = run.lora, run.deal
    yield "base", f"{lora.base_model}: {lora.kind}, {lora.dtype} on {run.accelerator.device}"
    yield "data set", f"{lora.dataset}, version {lora.dataset_digest[:12]}: {len(run.samples)} clips"
    yield "LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}"
    yield (
        "batches",
        f"{deal.batch_size} x {deal.ranks} processes x {deal.accumulation} accumulated = "
        f"{deal.global_batch}; {run.sampler.steps_per_epoch} steps an epoch",
    )
    if deal.accumulation != run.config.gradient_accumulation_steps:
        yield (
            "batches",
            f"accumulation follows from the checkpoint's global batch; --gradient_accumulation_steps "
            f"{run.config.gradient_accumulation_steps} does not count",
        )
    for bucket, count in run.sampler.left_out.items():
        least = f"with --drop_last {deal.global_batch}, " if run.config.drop_last else ""
        yield (
            "left out",
            f"all {count} clips of {run.samples.bucket_names[bucket]} are never trained on: an epoch has too few draws "
            f"of them for a batch ({least}by their weights and the shares of --dataset)",
        )
    yield "steps", f"{run.first_step} to {run.max_steps}, into {run.output_dir}"


def _take_steps(run: Run, stop: list[int]) -> int:
    """Step from `run.first_step` to the end, or until a signal has arrived on any rank."""
    config, accelerator = run.config, run.accelerator
    steps = range(run.first_step, run.max_steps)
    requests = Requests(run.samples, run.sampler, run.deal, accelerator.process_index, steps, run.draws)
    pinned = accelerator.device.type == "cuda"
    batches = micro_batches(
        run.reader,
        requests,
        num_workers=config.dataloader_num_workers,
        pin_memory=pinned,
        slot_bytes=run.reader.slot_bytes(run.samples.bucket_names, run.deal.batch_size),
    )
    with main_at_work(accelerator, "log"):
        if run.is_main:
            for folder in set_aside_later(run.output_dir, run.first_step):
                say("set aside", f"{folder}: it is later than the checkpoint that the run goes on from")
            forget_later(run.output_dir, run.first_step)
        opened = Log(run)
    taken: list[Taken] = []
    with closing(batches), closing(opened) as log:
        if run.held_out and run.first_step == 0:
            log.held_out(0, held_out_loss(run, run.held_out))
        if run.first_step == 0 and is_due(config, 0, run.sampler.steps_per_epoch):
            _save(run, log, 0)
            _validate(run, 0)
        for step in steps:
            done = step + 1
            is_last = done == run.max_steps
            evaluates = run.held_out is not None and (is_last or done % config.holdout_steps == 0)
            validates = is_due(config, done, run.sampler.steps_per_epoch)
            saves = is_last or validates or done % config.checkpointing_steps == 0
            # where there is but one rank, it knows by itself that it was asked to stop
            settles = (
                saves or evaluates or done % config.log_steps == 0 or bool(stop and accelerator.num_processes == 1)
            )
            taken.append(take_step(run, step, batches, stopping=bool(stop), lora_norm=settles))
            if not settles:
                continue
            rows, stopping = settle(run, taken)
            taken.clear()
            log.steps(rows)
            if run.held_out and evaluates:
                log.held_out(done, held_out_loss(run, run.held_out))
            if saves or stopping:
                _save(run, log, done)
            if stopping:
                signal_number = stop[0] if stop else signal.SIGTERM  # on whatever rank it arrived, all stop here
                if run.is_main:
                    say("stopped by", f"signal {signal_number} after step {done}; its checkpoint is saved")
                return 128 + signal_number
            if validates:
                _validate(run, done)
    with main_at_work(accelerator, "lora"):
        if run.is_main:
            path = save_result(run.state, run.output_dir, replace(run.lora, step=run.max_steps))
            say("LoRA", f"{path}: load it at weight 1.0, alpha is in the file")
    with main_at_work(accelerator, "hub"):
        if run.is_main:
            push_result(config, run.output_dir)
    return 0


def _save(run: Run, log: Log, step: int) -> None:
    with main_at_work(run.accelerator, f"checkpoint-{step}"):
        if run.is_main:
            log.sync()  # before the checkpoint has its name, the rows that lead to it are on the disk
            save_checkpoint(run.output_dir, step, run.state, replace(run.lora, step=step), run.position)
            rotate_checkpoints(run.output_dir, run.config.checkpoints_total_limit)


def _validate(run: Run, step: int) -> None:
    """Videos of the checkpoint of a step; the other ranks wait for them outside of any collective."""
    with main_at_work(run.accelerator, f"validation-{step}"):
        if not run.is_main:
            return  # from this block: it is left when the main one has left it
        with off_device(run):
            checkpoint = run.output_dir / f"checkpoint-{step}"
            videos = make_videos(run.config, run.samples.datasets[0], run.validation_rows, checkpoint, step)
            track_videos(run, videos, step)
            say("videos", f"{len(videos)} of step {step}, in {run.output_dir / FOLDER / f'step-{step}'}", step=step)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that a SIGTERM or SIGINT puts its number into; a second one ends the process at once.

    Not under a launcher: a cluster signals the launcher and its processes, and the launcher passes on what it got, so
    that each process gets it twice. It kills those that take too long itself.
    """
    arrived: list[int] = []
    has_launcher = launcher() is not None

    def note(number: int, frame: FrameType | None) -> None:
        if arrived and not has_launcher:
            raise SystemExit(128 + number)
        arrived.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
