"""What `python -m train` can be told: one field a flag."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from shared.config import check_name, secret
from shared.errors import ConfigError
from shared.validation import check_validation_flags
from train.local_cache import parse_size
from train.optim_flags import check_optimizer_flags


@dataclass(frozen=True)
class TrainConfig:
    """Stage 2: a latent cache becomes a LoRA; of the checkpoint only the transformer is loaded."""

    DATA: ClassVar[str] = "Data"
    cache: str = "cache"
    """The cache that stage 1 wrote."""
    dataset: str = "default"
    """Data set in the cache; or several, each with its share of the draws, such as people:0.7,places:0.3."""
    captions: Literal["all", "draw"] = "all"
    """Of a clip with several captions: visit it with each, or once an epoch with one, drawn by their weights."""
    drop_last: bool = False
    """Leave out the batches of an epoch that are not full, instead of weighing their missing places 0."""
    OUTPUT: ClassVar[str] = "Output"
    output_dir: str = "runs/lora"
    """Where checkpoints, metrics.jsonl and the LoRA are written; one run each."""
    MODEL: ClassVar[str] = "Model"
    pretrained_model_name_or_path: str | None = None
    """Checkpoint to fine-tune: a folder or a hub id; default: the one that the data set was made with."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the hub."""
    variant: str | None = None
    """Variant of the weight files, such as fp16."""
    cache_dir: str | None = None
    """Where the hub's files are kept; default: the hub's own place."""
    drop_learned_positions: bool = False
    """Leave out the learned positions of 5B-I2V, which fit one size only, in training and, by its file, in stage 3."""
    DRAWS: ClassVar[str] = "Random draws"
    seed: int = 42
    """Seed of every draw and of the order of samples, any whole number."""

    LORA: ClassVar[str] = "LoRA"
    rank: int = 64
    """Rank of the LoRA, at least 1."""
    lora_alpha: float = 64.0
    """The LoRA is scaled by lora_alpha / rank; above 0."""
    target_modules: str = "to_q,to_k,to_v,to_out.0"
    """Linear layers that get a LoRA, by the ends of their names; ff.net.0.proj,ff.net.2 are the feed-forward's."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(rank) instead, so that a higher rank does not learn more slowly."""
    use_dora: bool = False
    """Learn each output's magnitude apart from its direction (DoRA); slower, as each pass norms the weights."""
    lora_dropout: float = 0.0
    """Probability, 0 to below 1, that an input of the LoRA is dropped while training."""
    init_lora: str | None = None
    """Start from the matrices of a LoRA (a run, a checkpoint, a file) of the same shape; the optimizer starts anew."""
    ema_decay: float | None = None
    """Save the exponential moving average of the LoRA over steps, above 0 and below 1, such as 0.99; default: off."""
    MEMORY: ClassVar[str] = "Precision and memory"
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Of the frozen transformer and of the products; default: as its weights are stored. The LoRA is float32."""
    gradient_checkpointing: bool = True
    """Compute each block again in the backward pass: slower by a fifth, several times less memory."""
    allow_dtype: bool = False
    """Run a checkpoint that is stored in bfloat16 in float16, whose largest number is 65504, all the same."""
    base_precision: Literal["native", "int8", "fp8", "nf4"] = "native"
    """Of the frozen blocks' weights: as --mixed_precision, or 8 or 4 bits; the LoRA on top is float32 either way."""
    stream_blocks: int = 0
    """Keep the frozen blocks in host memory, and this many, at least 0, on the device: 2 copies ahead; 0: all."""
    offload_activations: bool = False
    """Keep what gradient checkpointing keeps of each block in host memory."""
    ff_chunks: int = 1
    """Chunks of tokens, at least 1, that the feed-forward, and what else works token by token, is computed in."""
    compile: bool = False
    """Compile the blocks, once for each bucket's shape: slower to start."""

    STEPS: ClassVar[str] = "Batches and steps"
    train_batch_size: int = 1
    """Samples of a micro-batch on each process, at least 1."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of an optimizer step, at least 1."""
    num_train_epochs: int = 1
    """Passes over the data set, at least 1, when --max_train_steps is not given."""
    max_train_steps: int | None = None
    """Optimizer steps of the whole run, at least 1; default: as --num_train_epochs says."""
    OBJECTIVE: ClassVar[str] = "Objective"
    caption_dropout: float = 0.0
    """Probability, 0 to 1, that a visit sees the empty prompt instead of its caption."""
    noised_image_dropout: float = 0.05
    """Image-to-video: probability, 0 to 1, that a visit sees zeros in place of its first frame."""
    image_factor: Literal["pipeline", "scale", "one"] = "pipeline"
    """Image-to-video: what first frames are multiplied by: as the pipeline does, the VAE's scaling factor, or 1."""
    timestep_sampling: Literal["stratified", "uniform"] = "stratified"
    """Stratified: a global batch covers the range of timesteps; each is uniform by itself either way."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """min_snr: gradients weigh timesteps by min(SNR, min_snr_gamma) / (SNR + 1); the loss that is told stays plain."""
    min_snr_gamma: float = 5.0
    """Of min_snr: the signal-to-noise ratio from which a timestep is held back, above 0; 5 is the paper's."""
    min_snr_floor: float = 0.05
    """Of min_snr: least weight, 0 to 1; at 0 the timestep that sampling starts from, of SNR 0, is not trained."""
    READING: ClassVar[str] = "Reading and processes"
    dataloader_num_workers: int = 0
    """Processes that read ahead, at least 0; 0: a thread."""
    prefetch: int = 4
    """Range reads that each of them has on their way at a time, at least 1."""
    local_cache: str | None = None
    """Folder of a local disk for copies of what is read of a remote cache; default: none are kept."""
    local_cache_size: str = "20GB"
    """Most that these copies hold, such as 500MB or 1.5TB; the least recently used go."""
    bad_samples: Literal["stop", "skip"] = "stop"
    """Of a sample that is damaged, gone or not finite: stop and name it, or name it and go on without it."""
    nccl_timeout: float = 1800.0
    """Seconds, above 0, that a rank waits for the others in a collective before the run is given up."""
    allow_tf32: bool = False
    """On a GPU: multiply float32 matrices with the 10 bits of TF32, faster; what is bfloat16 or float16 stays so."""

    OPTIMIZER: ClassVar[str] = "Optimizer and learning rate"
    optimizer: Literal["adam", "adamw", "prodigy"] = "adamw"
    """The optimizer; prodigy finds the size of its steps itself (extra `optim`) and takes a learning rate near 1."""
    learning_rate: float = 1e-4
    """Peak learning rate, at least 0."""
    scale_lr: bool = False
    """Multiply the learning rate by the global batch: batch size x accumulation x processes."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup",
        "piecewise_constant",
    ] = "constant"  # fmt: skip
    """Schedule of the learning rate, counted in optimizer steps."""
    lr_warmup_steps: int = 0
    """Optimizer steps, at least 0, over which the learning rate rises from 0."""
    lr_num_cycles: int = 1
    """Hard restarts of cosine_with_restarts, at least 1."""
    lr_power: float = 1.0
    """Power of polynomial, at least 0."""
    lr_step_rules: str | None = None
    """Of piecewise_constant: factors, each with the step that ends it, and the last one, such as 1:500,0.1:800,0.01."""
    adam_beta1: float = 0.9
    """Decay of the first moment, 0 to below 1."""
    adam_beta2: float = 0.95
    """Decay of the second moment, 0 to below 1."""
    adam_weight_decay: float = 1e-4
    """Weight decay, at least 0."""
    adam_epsilon: float = 1e-8
    """Added to the root of the second moment, at least 0."""
    prodigy_beta3: float | None = None
    """Of prodigy: decay of its estimate of the step size, 0 to below 1; default: the root of adam_beta2."""
    prodigy_decouple: bool = False
    """Of prodigy: weight decay apart from the gradient, as in AdamW."""
    prodigy_use_bias_correction: bool = False
    """Of prodigy: Adam's bias correction."""
    prodigy_safeguard_warmup: bool = False
    """Of prodigy: keep the learning rate out of its estimate, so that a warm-up does not disturb it."""
    use_8bit_adam: bool = False
    """Hold Adam's moments in 8 bits."""
    optimizer_offload: bool = False
    """Hold Adam's moments and the gradients in host memory, and step there."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm, at least 0; 0 leaves them."""
    max_bad_steps: int = 5
    """Steps in a row, at least 1, whose loss or gradient is not finite, and which are skipped, before the run ends."""

    HOLDOUT: ClassVar[str] = "Held-out loss and metrics"
    holdout: float = 0.0
    """Share of the source videos, 0 to below 1, that is never trained on; their loss is what to compare runs by."""
    holdout_dataset: str | None = None
    """Data set of the same cache to hold out, in place of a share."""
    holdout_steps: int = 100
    """Optimizer steps, at least 1, between two looks at what is held out; there are a first and a last, too."""
    log_steps: int = 1
    """Optimizer steps, at least 1, between two looks at the device: the rows of metrics.jsonl are written then."""

    VALIDATION: ClassVar[str] = "Validation videos"
    validation_prompt: str | None = None
    """Prompts of validation videos, which stage 1 was told too; default: those that the data set was made with."""
    validation_prompts: str | None = None
    """In place of --validation_prompt: a .txt, .csv or .jsonl file, a row a video, with size, frames, seed, image."""
    validation_prompt_separator: str = ":::"
    """What stands between validation prompts, and between validation images."""
    validation_images: str | None = None
    """Image-to-video: pictures that they start from, one for all prompts or one each; default: the data set's."""
    num_validation_videos: int = 1
    """Videos of each prompt, at least 1, each with a seed of its own."""
    validation_epochs: int | None = None
    """Epochs, at least 1, between two sets of validation videos; default: none are made."""
    validation_steps: int | None = None
    """Optimizer steps, at least 1, between two sets, in place of --validation_epochs."""
    validate_first: bool = False
    """Make a set before the first step too: what the base model does."""
    validation_inference_steps: int = 50
    """Denoising steps of a validation video, 1 to 1000."""
    validation_timeout: float = 3600.0
    """Seconds, above 0, that stage 3 may take over a set before it is ended and training goes on."""
    guidance_scale: float = 6.0
    """How strongly the prompt guides in validation videos, at least 0."""
    use_dynamic_cfg: bool = False
    """Vary the guidance of validation videos from step to step as diffusers does."""

    CHECKPOINTS: ClassVar[str] = "Checkpoints"
    checkpointing_steps: int = 500
    """Optimizer steps, at least 1, between checkpoints; the last step has one in any case."""
    checkpoints_total_limit: int | None = None
    """Checkpoints to keep, at least 1; default: all. The oldest goes once a new one stands."""
    resume_from_checkpoint: str | None = None
    """Go on from a checkpoint's folder, or from the latest (which starts anew where there is none)."""
    TRACKERS: ClassVar[str] = "Trackers"
    report_to: Literal["none", "all", "wandb", "tensorboard", "comet_ml", "trackio"] = "none"
    """Tracker that is given what metrics.jsonl holds."""
    tracker_name: str = "latentreel"
    """Project name for the tracker."""
    logging_dir: str = "logs"
    """Folder in the output folder for trackers that write files."""
    HUB: ClassVar[str] = "Hub"
    push_to_hub: bool = False
    """Push the LoRA, its card and the card's videos to the hub at the end; where that fails the run still succeeds."""
    hub_model_id: str | None = None
    """Repository to push to, as owner/name; default: one named like the output folder, of the token's owner."""
    hub_token: str | None = secret()
    """Token that may write there; better in HF_TOKEN or by `hf auth login`: trackers record command lines."""
    hub_license: str = "other"
    """Licence that the card names, such as apache-2.0; other points at the base model's."""

    def __post_init__(self) -> None:
        names = [check_name(name) for name, _ in self.datasets]
        if len(set(names)) < len(names):
            raise ConfigError(f"--dataset {self.dataset}: names a data set twice; give it once, with one share")
        for name in ("rank", "train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "log_steps",
                     "checkpointing_steps", "lr_num_cycles", "max_bad_steps", "holdout_steps", "prefetch",
                     "ff_chunks", "num_validation_videos"):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be at least 1")
        parse_size(self.local_cache_size)
        for name in ("max_train_steps", "checkpoints_total_limit", "validation_epochs", "validation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be at least 1, or left out")
        for name in ("dataloader_num_workers", "lr_warmup_steps", "learning_rate", "max_grad_norm",
                     "adam_weight_decay", "stream_blocks", "lr_power"):  # fmt: skip
            if not getattr(self, name) >= 0:
                raise ConfigError(f"--{name} {getattr(self, name)}; must not be negative")
        if not 1 <= self.validation_inference_steps <= 1000:
            raise ConfigError(f"--validation_inference_steps {self.validation_inference_steps}; must be 1 to 1000")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ConfigError(f"--guidance_scale {self.guidance_scale}; must be a number of 0 or more, such as 6")
        if self.validation_epochs and self.validation_steps:
            raise ConfigError("--validation_steps: stands in place of --validation_epochs; give one of them")
        check_validation_flags(self.validation_prompt, self.validation_prompts, self.validation_prompt_separator)
        for name in ("validation_timeout", "nccl_timeout"):
            if not 0 < getattr(self, name) <= 1e9:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be above 0 seconds, and at most 1e9")
        if not self.lora_alpha > 0:
            raise ConfigError(f"--lora_alpha {self.lora_alpha}; must be above 0; usual values are rank and rank / 2")
        if not 0 <= self.holdout < 1:
            raise ConfigError(f"--holdout {self.holdout}; must be a share of the videos, from 0 to below 1")
        if self.holdout and self.holdout_dataset is not None:
            raise ConfigError(f"--holdout {self.holdout}: stands beside --holdout_dataset; give one or the other")
        if not all(self.targets):
            raise ConfigError(f"--target_modules {self.target_modules!r}; must be names with commas between")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"--lora_dropout {self.lora_dropout}; must be a probability below 1, such as 0.1")
        if self.lora_dropout and self.use_dora:
            told = f"--lora_dropout {self.lora_dropout} with --use_dora"
            raise ConfigError(f"{told}: PEFT's DoRA would drop inputs of the frozen weights too; give one of them")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ConfigError(f"--ema_decay {self.ema_decay}; must be above 0 and below 1, or left out")
        if not self.min_snr_gamma > 0:
            raise ConfigError(f"--min_snr_gamma {self.min_snr_gamma}; must be above 0; the paper's is 5")
        if not 0 <= self.min_snr_floor <= 1:
            raise ConfigError(f"--min_snr_floor {self.min_snr_floor}; must be a weight, 0 to 1")
        if self.hub_token is not None and self.report_to != "none":
            raise ConfigError(
                f"--hub_token with --report_to {self.report_to}: trackers record command lines, and the token with "
                "them; set HF_TOKEN or run `hf auth login`, and leave --hub_token out"
            )
        if not self.push_to_hub:
            for name, default in (("hub_model_id", None), ("hub_token", None), ("hub_license", "other")):
                if getattr(self, name) != default:
                    raise ConfigError(f"--{name}: is for --push_to_hub; give both or leave it out")
        for name in ("caption_dropout", "noised_image_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be a probability, 0 to 1")
        check_optimizer_flags(self)

    @property
    def datasets(self) -> list[tuple[str, float]]:
        """The data sets by name, each with its share of the draws.

        Raises:
            ConfigError: a share that is none, or that is missing where there are several.
        """
        entries = [entry.strip().partition(":") for entry in self.dataset.split(",")]
        try:
            found = [(name, float(share) if mark else 1.0) for name, mark, share in entries]
        except ValueError:
            found = []
        if not found or not all(0 < share < float("inf") for _, share in found):
            raise ConfigError(f"--dataset {self.dataset}: shares must be above 0, such as people:0.7,places:0.3")
        if len(found) > 1 and not all(mark for _, mark, _ in entries):
            raise ConfigError(f"--dataset {self.dataset}: of several data sets each needs its share, such as name:0.5")
        return found

    @property
    def targets(self) -> tuple[str, ...]:
        """The target modules, each once."""
        return tuple(dict.fromkeys(name.strip() for name in self.target_modules.split(",")))
