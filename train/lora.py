"""The LoRA of a run before its first step: drawn anew, or with the matrices of another LoRA (`--init_lora`)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.digests import file_digest
from shared.errors import LoraError
from shared.geometry import Bucket
from shared.lora import PREFIX, LoraFacts, add_lora, find_lora, load_lora_state, read_metadata
from shared.models import Checkpoint
from shared.seeds import seed_for
from train.config import TrainConfig
from train.dropout import Visit, add_dropout
from train.mixture import Mixture


@dataclass(frozen=True)
class Initial:
    """The LoRA file that a run starts from."""

    path: Path
    digest: str


def find_initial(config: TrainConfig) -> Initial | None:
    """What `--init_lora` names, if anything, when the run would apply its matrices as it was trained to.

    Raises:
        LoraError: there is none, or it is of another rank, strength or kind, or does not say so.
    """
    if config.init_lora is None:
        return None
    path = find_lora(config.init_lora, "--init_lora")
    adapter, _ = read_metadata(path)
    if adapter is None:
        raise LoraError(
            f"--init_lora {path}: does not say its alpha (no lora_adapter_metadata), so its strength is not known; "
            "give a LoRA that stage 2 saved, or diffusers with its metadata"
        )
    expected: dict[str, Any] = {
        "r": config.rank,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for name, value in expected.items():
        told = adapter.get(f"{PREFIX}{name}")
        if told != value:
            flag = {"r": "rank"}.get(name, name)
            raise LoraError(
                f"--init_lora {path}: its {flag} is {told!r}, this run's is {value!r}; give the flags that it was "
                "trained with, or start without it"
            )
    return Initial(path, file_digest(path))


def make_lora(transformer: Any, config: TrainConfig, initial: Initial | None) -> Visit:
    """Inject a run's LoRA, with its dropout.

    Returns:
        What must be told which samples the transformer sees, for their dropout.

    Raises:
        LoraError: no layer of a name in `--target_modules`, or a LoRA to start from that has others.
    """
    add_lora(
        transformer,
        rank=config.rank,
        alpha=config.lora_alpha,
        target_modules=config.targets,
        seed=seed_for(config.seed, "lora"),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    if initial is not None:
        load_lora_state(transformer, initial.path)
    return add_dropout(transformer, config.lora_dropout, config.seed)


def lora_facts(config: TrainConfig, base: Checkpoint, samples: Mixture, dtype: str) -> LoraFacts:
    """What a run's LoRA file says of the run, at step 0.

    Args:
        dtype: of the frozen base.
    """
    bucket = Bucket.parse(samples.bucket_names[int(np.bincount(samples.buckets).argmax())])  # the first of the largest
    embeddings = samples.datasets[0].info["facts"]["embeddings"]
    tokens = {dataset.info["id_token"] for dataset in samples.datasets}
    return LoraFacts(
        base_model=base.name,
        revision=base.revision,
        variant=base.variant,
        kind=base.facts.kind,
        rank=config.rank,
        alpha=config.lora_alpha,
        target_modules=list(config.targets),
        dataset=config.dataset,
        dataset_digest=samples.digest,
        id_token=tokens.pop() if len(tokens) == 1 else None,  # of several, each prompt must say its own
        seed=config.seed,
        step=0,
        dtype=dtype,
        text_dtype=embeddings["dtype"],
        cache_dtype=embeddings["cache_dtype"],
        frames=bucket.frames,
        height=bucket.height,
        width=bucket.width,
        fps=samples.fps,
        dropout=config.lora_dropout,
        clips=len(samples),
        image_factor=config.image_factor if base.facts.image_to_video else None,
        drop_learned_positions=config.drop_learned_positions,
    )
