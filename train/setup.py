"""Everything that a run needs before its first step: opened, checked against each other, put on the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

from shared.cache import Cache
from shared.config import to_dict
from shared.console import say
from shared.dataset import DataSet, open_dataset
from shared.errors import CheckpointError, ConfigError
from shared.lora import LoraFacts, trainable
from shared.models import Checkpoint, choose_device, load_transformer
from shared.prompt_file import PromptRow
from shared.sizes import check_dtype
from shared.storage import FileLock, write_atomically
from train.base import DTYPES, PRECISIONS, open_base
from train.check import check_dataset, check_flags, check_lora_file
from train.checkpoint import FIXED, RunState, check_position, list_checkpoints, load_checkpoint, read_state
from train.config import TrainConfig
from train.ema import Ema
from train.holdout import DRAWS, HeldOut, are_among, held_samples
from train.local_cache import LocalCache, parse_size
from train.lora import find_initial, lora_facts, make_lora
from train.memory import check_levers, prepare
from train.mixture import Mixture
from train.objective import alphas_cumprod
from train.optim import make_optimizer, make_schedule
from train.quantise import quantise
from train.ranks import check_processes, check_same_start, check_strategy, main_at_work
from train.reading import LatentDataset
from train.run import Run
from train.sampler import Deal, Sampler, deal_as
from train.samples import DrawSettings, kinds_for
from train.trackers import chosen_trackers
from train.validation_rows import choose_rows, store_rows


def open_run(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Open all that a run needs.

    Raises:
        UserError: a data set, checkpoint, flag or output folder that does not fit.
    """
    check_levers(config, accelerator.device, processes=accelerator.num_processes, precision=accelerator.mixed_precision)
    datasets = open_datasets(config)
    reading = _reading(config, datasets[0].cache)
    base = open_base(config, datasets[0].info["model"])
    check_flags(config, base)
    samples = _mix(config, datasets, base)
    if accelerator.is_main_process:
        say("model", f"{base.name}: {base.facts.kind}")
    held_out, held = _hold_out(config, samples, base, reading)
    numbers = samples.numbers(held)

    output_dir = Path(config.output_dir)
    resumed = _find_checkpoint(config, output_dir, accelerator)
    deal = Deal(config.train_batch_size, accelerator.num_processes, config.gradient_accumulation_steps)
    if resumed is not None:
        deal = deal_as(resumed[1]["position"]["global_batch"], config.train_batch_size, accelerator.num_processes)
    sampler = _order(config, samples, numbers, deal)
    max_steps = config.max_train_steps or config.num_train_epochs * sampler.steps_per_epoch
    dtype = DTYPES[accelerator.mixed_precision]
    lora = lora_facts(config, base, samples, dtype)
    initial = find_initial(config)
    position = {
        "base_model": base.name,
        "base_revision": base.revision,
        "base_variant": base.variant,
        "dtype": dtype,
        "held_out": held_out.digest if held_out else None,
        "max_train_steps": max_steps,
        "init_lora": initial.digest if initial else None,
        **_agreed(config, samples, deal),
    }
    if resumed is not None:
        check_position(*resumed, position)
    check_same_start(accelerator, output_dir, resumed[1]["step"] if resumed else 0, position)
    rows = _validation_rows(config, datasets[0], base, lora, accelerator)

    transformer = load_transformer(base, getattr(torch, dtype), drop_learned_positions=config.drop_learned_positions)
    visit = make_lora(transformer, config, initial if resumed is None else None)
    quantise(transformer, config.base_precision, accelerator.device)
    prepare(transformer, config, accelerator.device)
    transformer.train()
    with main_at_work(accelerator, "open_run"):
        if accelerator.is_main_process:
            check_lora_file(transformer, lora, output_dir)
            write_atomically(output_dir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")

    optimizer = make_optimizer(config, trainable(transformer), deal.global_batch)
    lr_schedule = make_schedule(config, optimizer, max_steps)
    model, prepared = accelerator.prepare(transformer, optimizer)
    ema = None if config.ema_decay is None else Ema(trainable(transformer), config.ema_decay)
    state = RunState(transformer, optimizer, lr_schedule, accelerator.scaler, ema)
    if resumed is not None:
        load_checkpoint(*resumed, state)
    draws = DrawSettings(
        seed=config.seed,
        global_batch=deal.global_batch,
        stratified=config.timestep_sampling == "stratified",
        random_flip=samples.random_flip,
        caption_dropout=config.caption_dropout,
        noised_image_dropout=config.noised_image_dropout,
    )
    return Run(
        config=config,
        accelerator=accelerator,
        output_dir=output_dir,
        facts=base.facts,
        samples=samples,
        held_out=held_out,
        reader=LatentDataset(datasets, base.facts, draws, **reading),
        draws=draws,
        sampler=sampler,
        deal=deal,
        model=model,
        optimizer=prepared,
        state=state,
        visit=visit,
        schedule=alphas_cumprod(base.config("scheduler")).to(accelerator.device),
        dtype=getattr(torch, dtype),
        lora=lora,
        position=position,
        first_step=resumed[1]["step"] if resumed else 0,
        max_steps=max_steps,
        validation_rows=rows,
    )


def _validation_rows(
    config: TrainConfig, dataset: DataSet, base: Checkpoint, lora: LoraFacts, accelerator: Accelerator
) -> list[PromptRow]:
    """The rows of validation videos, their pictures in the run's folder; none where none are made or asked for.

    Those that still lack a picture are left to whoever makes videos of the run later (train/validate.py).
    """
    makes_videos = bool(config.validate_first or config.validation_steps or config.validation_epochs)
    flags = (config.validation_prompt, config.validation_prompts, config.validation_images)
    if not makes_videos and flags == (None, None, None):
        return []
    rows = choose_rows(config, dataset, base, lora, makes_videos=makes_videos)
    if makes_videos or all(row.image for row in rows) or not base.facts.image_to_video:
        with main_at_work(accelerator, "validation"):
            if accelerator.is_main_process and rows:
                rows = store_rows(Path(config.output_dir), rows, dataset.cache)
    return rows


def _order(config: TrainConfig, samples: Mixture, numbers: np.ndarray | None, deal: Deal) -> Sampler:
    """The order of the samples of these numbers; None: of all."""
    weights = samples.draw_weights(numbers)
    order = Sampler(
        samples.buckets, deal.global_batch, samples.digest, config.seed, numbers, weights, config.drop_last
    )  # fmt: skip
    if not order.steps_per_epoch:
        raise ConfigError(
            f"--drop_last: no bucket has the {deal.global_batch} clips of a global batch; leave it out, or lower "
            "--train_batch_size or --gradient_accumulation_steps"
        )
    return order


def _agreed(config: TrainConfig, samples: Mixture, deal: Deal) -> dict[str, Any]:
    """What a checkpoint must agree on, of the flags and of the data."""
    return {
        "dataset": config.dataset,
        "dataset_digest": samples.digest,
        "random_flip": samples.random_flip,
        "global_batch": deal.global_batch,
        "target_modules": sorted(config.targets),
        **{name: getattr(config, name) for name in FIXED},
    }


def open_datasets(config: TrainConfig) -> list[DataSet]:
    """The data sets that `--dataset` names."""
    cache = Cache(config.cache)
    return [open_dataset(cache, name) for name, _ in config.datasets]


def _mix(config: TrainConfig, datasets: list[DataSet], base: Checkpoint) -> Mixture:
    shares = [share for _, share in config.datasets] if len(datasets) > 1 else None
    samples = Mixture(datasets, shares, draw_captions=config.captions == "draw", kinds=kinds_for(base.facts))
    for dataset, part in zip(datasets, samples.parts, strict=True):
        check_dataset(dataset, base, part.bucket_names, drop_learned_positions=config.drop_learned_positions)
    return samples


def _hold_out(
    config: TrainConfig, samples: Mixture, base: Checkpoint, reading: dict[str, Any]
) -> tuple[HeldOut | None, np.ndarray | None]:
    """What is held out, and which samples [N] that leaves untrained; None: none."""
    if config.holdout_dataset is not None:
        other = open_dataset(samples.datasets[0].cache, config.holdout_dataset)
        others = Mixture([other], kinds=kinds_for(base.facts))
        check_dataset(other, base, others.bucket_names, drop_learned_positions=config.drop_learned_positions)
        both = are_among(others.latent_keys(), samples.latent_keys())
        if both.any():
            raise ConfigError(
                f"--holdout_dataset {config.holdout_dataset}: {both.sum()} of its {len(others)} samples are of clips "
                f"that --dataset {config.dataset} trains on, the first {others.sources()[int(both.argmax())]}; leave "
                "them out of one of the two"
            )
        return HeldOut(others, LatentDataset(other, base.facts, DRAWS, **reading), np.arange(len(others))), None
    if not config.holdout:
        return None, None
    held = held_samples(samples, config.holdout)
    reader = LatentDataset(samples.datasets, base.facts, DRAWS, **reading)
    return HeldOut(samples, reader, np.flatnonzero(held)), held


def _reading(config: TrainConfig, cache: Cache) -> dict[str, Any]:
    """How a run reads, whatever it reads."""
    return {
        "prefetch": config.prefetch,
        "local_cache": open_local_cache(config, cache),
        "skip_bad": config.bad_samples == "skip",
        "image_factor": config.image_factor,
    }


def open_local_cache(config: TrainConfig, cache: Cache) -> LocalCache | None:
    """The copies of a remote cache that were asked for.

    Raises:
        ConfigError: the cache is not remote, or the folder cannot be written to.
    """
    if config.local_cache is None:
        return None
    if cache.storage.is_local:
        raise ConfigError(
            f"--local_cache {config.local_cache}: --cache {cache.url} is a folder already; leave --local_cache out"
        )
    copies = LocalCache(Path(config.local_cache), parse_size(config.local_cache_size))
    copies.open()
    return copies


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of the processes, devices, precision and trackers of this run.

    Raises:
        ConfigError: float16 on a CPU, or a launcher's settings that do not work.
    """
    precision: str | None = config.mixed_precision
    base = open_base(config, open_datasets(config)[0].info["model"])
    if precision is None:
        precision = PRECISIONS[base.stored_dtype("transformer")]
        if precision == "fp16" and choose_device() == "cpu":
            precision = "no"
    check_dtype(base, "transformer", DTYPES[precision], "--mixed_precision fp16", allowed=config.allow_dtype)
    if precision == "fp16" and choose_device() == "cpu":
        raise ConfigError("--mixed_precision fp16: needs a GPU; give no or bf16 on a CPU")
    check_strategy()
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=chosen_trackers(config.report_to) or None,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.nccl_timeout)),
            DistributedDataParallelKwargs(find_unused_parameters=False),  # each of the LoRA's is used in every pass
        ],
    )
    check_processes(accelerator)
    return accelerator


@contextmanager
def one_run(config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """The output folder, made, and held against a second run by the main process.

    Raises:
        CheckpointError: another run writes into it.
    """
    lock = None
    with main_at_work(accelerator, "lock"):
        if accelerator.is_main_process:
            lock = _lock(Path(config.output_dir))
    try:
        yield
    finally:
        if lock:
            lock.release()


def _lock(output_dir: Path) -> FileLock:
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock")
    if not lock.acquire():
        raise CheckpointError(f"--output_dir {output_dir}: another run is writing there; wait for it, or give another")
    return lock


def _find_checkpoint(
    config: TrainConfig, output_dir: Path, accelerator: Accelerator
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its state.json, if any."""
    asked, there = config.resume_from_checkpoint, list_checkpoints(output_dir)
    if asked is None:
        if there:
            raise CheckpointError(
                f"--output_dir {output_dir}: holds {there[-1].name}; go on from it with "
                "--resume_from_checkpoint latest, or give another folder"
            )
        return None
    if asked == "latest":
        if not there:
            if accelerator.is_main_process:
                say("resume", f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint; the run starts anew")
            return None
        folder = there[-1]
    else:
        named = output_dir / asked if "/" not in asked else Path(asked)
        folder = next((path for path in (Path(asked), output_dir / asked) if path.is_dir()), named)
    return folder, read_state(folder)
