"""Everything that a run needs before its first step: opened, checked against each other, put on the device."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from shared.cache import Cache
from shared.config import to_dict
from shared.dataset import DataSet, open_dataset
from shared.errors import CheckpointError, ConfigError
from shared.geometry import Bucket
from shared.lora import TARGET_MODULES, LoraFacts, add_lora, trainable
from shared.models import Checkpoint, Facts, choose_device, load_transformer, open_checkpoint
from shared.seeds import seed_for
from shared.storage import FileLock, write_atomically
from train.check import check_dataset, check_lora_file
from train.checkpoint import RunState, check_position, list_checkpoints, load_checkpoint, read_state
from train.config import FIXED, TrainConfig
from train.data import DrawSettings, LatentDataset, Samples
from train.objective import alphas_cumprod
from train.optim import make_optimizer, make_schedule
from train.sampler import Deal, Sampler, deal_as

DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
PRECISIONS = {dtype: precision for precision, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Run:
    """A run that is ready for `first_step`.

    Attributes:
        model: what the forward pass is called on: the transformer, or its DDP wrapper.
        optimizer: as accelerate prepared it.
        schedule: abar [1000] of the noise schedule, on the device.
        position: what a checkpoint must agree on to be gone on from.
    """

    config: TrainConfig
    accelerator: Accelerator
    output_dir: Path
    facts: Facts
    samples: Samples
    reader: LatentDataset
    draws: DrawSettings
    sampler: Sampler
    deal: Deal
    model: Any
    optimizer: Any
    state: RunState
    schedule: torch.Tensor
    dtype: torch.dtype
    lora: LoraFacts
    position: dict[str, Any]
    first_step: int
    max_steps: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return bool(self.accelerator.is_main_process)


def open_run(config: TrainConfig, accelerator: Accelerator) -> Run:
    """Open all that a run needs.

    Raises:
        UserError: a data set, checkpoint, flag or output folder that does not fit.
    """
    dataset = open_dataset(Cache(config.cache), config.dataset)
    base = open_base(config, dataset)
    samples = Samples(dataset)
    check_dataset(dataset, base, samples.bucket_names)

    output_dir = Path(config.output_dir)
    resumed = _find_checkpoint(config, output_dir, accelerator)
    deal = Deal(config.train_batch_size, accelerator.num_processes, config.gradient_accumulation_steps)
    if resumed is not None:
        deal = deal_as(resumed[1]["position"]["global_batch"], config.train_batch_size, accelerator.num_processes)
    sampler = Sampler(samples.buckets, deal.global_batch, dataset.digest, config.seed)
    max_steps = config.max_train_steps or config.num_train_epochs * sampler.steps_per_epoch
    dtype = DTYPES[accelerator.mixed_precision]
    position = {
        "dataset": dataset.name,
        "dataset_digest": dataset.digest,
        "random_flip": dataset.info["random_flip"],
        "base_model": base.name,
        "dtype": dtype,
        "global_batch": deal.global_batch,
        "max_train_steps": max_steps,
        **{name: getattr(config, name) for name in FIXED},
    }
    if resumed is not None:
        check_position(*resumed, position)

    transformer = load_transformer(base, getattr(torch, dtype))
    add_lora(
        transformer,
        rank=config.rank,
        alpha=config.lora_alpha,
        target_modules=TARGET_MODULES,
        seed=seed_for(config.seed, "lora"),
    )
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.train()
    lora = _lora_facts(config, dataset, base, samples, dtype)
    if accelerator.is_main_process:
        check_lora_file(transformer, lora, output_dir)
        write_atomically(output_dir / "config.json", json.dumps(to_dict(config), indent=2) + "\n")

    optimizer = make_optimizer(config, trainable(transformer))
    lr_schedule = make_schedule(config, optimizer, max_steps)
    model, prepared = accelerator.prepare(transformer, optimizer)
    state = RunState(transformer, optimizer, lr_schedule, accelerator.scaler)
    if resumed is not None:
        load_checkpoint(*resumed, state)
    draws = DrawSettings(
        seed=config.seed,
        global_batch=deal.global_batch,
        stratified=config.timestep_sampling == "stratified",
        random_flip=dataset.info["random_flip"],
        caption_dropout=config.caption_dropout,
    )
    return Run(
        config=config,
        accelerator=accelerator,
        output_dir=output_dir,
        facts=base.facts,
        samples=samples,
        reader=LatentDataset(dataset, base.facts, draws),
        draws=draws,
        sampler=sampler,
        deal=deal,
        model=model,
        optimizer=prepared,
        state=state,
        schedule=alphas_cumprod(base.config("scheduler")).to(accelerator.device),
        dtype=getattr(torch, dtype),
        lora=lora,
        position=position,
        first_step=resumed[1]["step"] if resumed else 0,
        max_steps=max_steps,
    )


def open_base(config: TrainConfig, dataset: DataSet) -> Checkpoint:
    """The checkpoint to fine-tune: the one that was asked for, else the one that made the data set."""
    made_with = dataset.info["model"]
    asked = config.pretrained_model_name_or_path
    return open_checkpoint(
        asked or made_with["name"],
        revision=config.revision if asked else config.revision or made_with["revision"],
        variant=config.variant if asked else config.variant or made_with["variant"],
        cache_dir=config.cache_dir,
        weights=("transformer",),
    )


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's view of the processes, devices, precision and trackers of this run.

    Raises:
        ConfigError: float16 on a CPU.
    """
    precision: str | None = config.mixed_precision
    if precision is None:
        dataset = open_dataset(Cache(config.cache), config.dataset)
        stored = open_base(config, dataset).stored_dtype("transformer")
        precision = PRECISIONS[stored]
        if precision == "fp16" and choose_device() == "cpu":
            precision = "no"
    if precision == "fp16" and choose_device() == "cpu":
        raise ConfigError("--mixed_precision fp16: needs a GPU; give no or bf16 on a CPU")
    return Accelerator(
        mixed_precision=precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / config.logging_dir)
        ),
    )


@contextmanager
def one_run(config: TrainConfig, accelerator: Accelerator) -> Iterator[None]:
    """The output folder, made, and held against a second run by the main process.

    Raises:
        CheckpointError: another run writes into it.
    """
    if not accelerator.is_main_process:
        yield
        return
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(output_dir / ".lock")
    if not lock.acquire():
        raise CheckpointError(f"--output_dir {output_dir}: another run is writing there; wait for it, or give another")
    try:
        yield
    finally:
        lock.release()


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
            accelerator.print(f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint; the run starts anew")
            return None
        folder = there[-1]
    else:
        folder = next((path for path in (Path(asked), output_dir / asked) if path.is_dir()), Path(asked))
    return folder, read_state(folder)


def _lora_facts(config: TrainConfig, dataset: DataSet, base: Checkpoint, samples: Samples, dtype: str) -> LoraFacts:
    counts = Counter(samples.buckets.tolist())
    bucket = Bucket.parse(samples.bucket_names[min(counts, key=lambda number: (-counts[number], number))])
    embeddings = dataset.info["facts"]["embeddings"]
    return LoraFacts(
        base_model=base.name,
        revision=base.revision,
        variant=base.variant,
        kind=base.facts.kind,
        rank=config.rank,
        alpha=config.lora_alpha,
        target_modules=list(TARGET_MODULES),
        dataset=dataset.name,
        dataset_digest=dataset.digest,
        id_token=dataset.info["id_token"],
        seed=config.seed,
        step=0,
        dtype=dtype,
        text_dtype=embeddings["dtype"],
        cache_dtype=embeddings["cache_dtype"],
        frames=bucket.frames,
        height=bucket.height,
        width=bucket.width,
        fps=samples.fps,
    )
