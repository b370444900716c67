"""What `python -m train` can be told: one field a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.config import check_name
from shared.errors import ConfigError

# Flags that change the numbers of a run: it is gone on from with the same values. The base model, its dtype, the global
# batch and the number of steps are compared as they come out, with what the data set says.
FIXED = (
    "seed", "rank", "lora_alpha", "caption_dropout", "timestep_sampling", "optimizer", "learning_rate", "lr_scheduler",
    "lr_warmup_steps", "lr_num_cycles", "lr_power", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon",
    "max_grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Stage 2: a latent cache becomes a LoRA; of the checkpoint only the transformer is loaded."""

    cache: str = "cache"
    """The cache that stage 1 wrote."""
    dataset: str = "default"
    """Name of the data set in the cache."""
    output_dir: str = "runs/lora"
    """Where checkpoints, metrics.jsonl and the LoRA are written; one run each."""

    pretrained_model_name_or_path: str | None = None
    """Checkpoint to fine-tune: a folder or a hub id; default: the one that the data set was made with."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    cache_dir: str | None = None
    """Where the hub's files are kept; default: the hub's own place."""
    seed: int = 42
    """Seed of every draw and of the order of samples."""

    rank: int = 64
    """Rank of the LoRA."""
    lora_alpha: float = 64.0
    """The LoRA is scaled by lora_alpha / rank."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Of the frozen transformer and of the products; default: as its weights are stored. The LoRA is float32."""
    gradient_checkpointing: bool = True
    """Compute each block again in the backward pass: slower by a fifth, several times less memory."""

    train_batch_size: int = 1
    """Samples of a micro-batch on each process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step."""
    num_train_epochs: int = 1
    """Passes over the data set, when --max_train_steps is not given."""
    max_train_steps: int | None = None
    """Optimizer steps of the whole run."""
    caption_dropout: float = 0.0
    """Probability that a visit sees the empty prompt instead of its caption."""
    timestep_sampling: Literal["stratified", "uniform"] = "stratified"
    """Stratified: a global batch covers the range of timesteps; each is uniform by itself either way."""
    dataloader_num_workers: int = 0
    """Processes that read ahead; 0: a thread."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    """The optimizer."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "constant"
    """Schedule of the learning rate, counted in optimizer steps."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from 0."""
    lr_num_cycles: int = 1
    """Hard restarts of cosine_with_restarts."""
    lr_power: float = 1.0
    """Power of polynomial."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.95
    """Decay of the second moment."""
    adam_weight_decay: float = 1e-4
    """Weight decay."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""

    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints; the last step has one in any case."""
    checkpoints_total_limit: int | None = None
    """Checkpoints to keep; the oldest goes once a new one stands."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint's folder, or from the latest (which starts anew where there is none)."""
    report_to: Literal["none", "all", "wandb", "tensorboard", "comet_ml", "trackio"] = "none"
    """Tracker that is given what metrics.jsonl holds."""
    tracker_name: str = "latentreel"
    """Project name for the tracker."""
    logging_dir: str = "logs"
    """Folder in the output folder for trackers that write files."""

    def __post_init__(self) -> None:
        check_name(self.dataset)
        for name in ("rank", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs",
                     "checkpointing_steps", "lr_num_cycles"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be at least 1")
        for name in ("max_train_steps", "checkpoints_total_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be at least 1, or left out")
        for name in (
            "dataloader_num_workers",
            "lr_warmup_steps",
            "learning_rate",
            "max_grad_norm",
            "adam_weight_decay",
        ):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name} {getattr(self, name)}; must not be negative")
        if not self.lora_alpha > 0:
            raise ConfigError(f"--lora_alpha {self.lora_alpha}; must be above 0; usual values are rank and rank / 2")
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"--caption_dropout {self.caption_dropout}; must be a probability, 0 to 1")
