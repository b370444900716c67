"""What `python -m infer` can be told: one field a flag."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from tyro.conf import UseAppendAction

from shared.errors import ConfigError
from shared.prompt_file import PromptRow, read_prompts

# What may stand beside --recipe: where files lie on this machine, and where weights are.
PLACES = (
    "recipe", "lora", "image", "pretrained_model_name_or_path", "cache_dir", "cache", "dataset", "output_dir",
    "preset", "offload", "device_map", "vae_slicing",
)  # fmt: skip


@dataclass(frozen=True)
class InferConfig:
    """Stage 3: a LoRA and prompts become videos, each with a recipe that makes it again."""

    LORA: ClassVar[str] = "LoRA"

    lora: UseAppendAction[tuple[str, ...]] = ()
    """LoRA, with its weight after a colon (a:0.8), several times for several: a run, checkpoint, file or hub id."""
    lora_scale: float = 1.0
    """Strength of all LoRAs together, any finite number: 1 as trained (alpha is in the file), 0 the base model."""
    compare: str | None = None
    """Strengths to make each video at, such as base,0.5,1.0 (base: 0): also side by side, in one video."""

    PROMPTS: ClassVar[str] = "Prompts and images"

    recipe: str | None = None
    """The JSON beside a video: make that video again, and nothing else; changed files are refused."""
    prompt: str | None = None
    """Text to make a video of."""
    prompts: str | None = None
    """In place of --prompt: a file of them, .txt (a prompt a line), .csv or .jsonl, whose rows win over the flags."""
    image: str | None = None
    """Picture that the videos start from, for an image-to-video checkpoint: resized to cover the size, and cropped."""
    id_token: bool = True
    """Put the LoRAs' id tokens before each prompt, unless it begins with them."""

    MODEL: ClassVar[str] = "Model"
    pretrained_model_name_or_path: str | None = None
    """Checkpoint: a folder or a hub id such as THUDM/CogVideoX-2b; default: what the LoRA was trained on."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the hub; default: the LoRA's, where it names the checkpoint."""
    variant: str | None = None
    """Variant of the weight files, such as fp16; default: the LoRA's, where it names the checkpoint."""
    cache_dir: str | None = None
    """Where the hub's files are kept; default: the hub's own place."""

    SIZE: ClassVar[str] = "Size and frames"
    height: int | None = None
    """Height in pixels, a multiple of 16; default: what the LoRA was trained at, else the checkpoint's own."""
    width: int | None = None
    """Width in pixels, a multiple of 16; default: what the LoRA was trained at, else the checkpoint's own."""
    num_frames: int | None = None
    """Frames, 4k + 1; default: what the LoRA was trained at, else the checkpoint's own."""
    fps: float | None = None
    """Frames per second of the file, 1 to 1000; default: what the LoRA was trained at, else the checkpoint's own."""

    DENOISING: ClassVar[str] = "Denoising"
    num_inference_steps: int = 50
    """Denoising steps, 1 to 1000."""
    guidance_scale: float = 6.0
    """How strongly the prompt guides (classifier-free guidance), at least 0; up to 1: not at all, in half the time."""
    use_dynamic_cfg: bool = False
    """Vary the guidance from step to step as diffusers does; it is no ramp there (docs/infer.md)."""
    seed: int = 42
    """Seed of a video's noise, at least 0; of several videos of a prompt the first one's."""
    num_videos: int = 1
    """Videos of each prompt, at least 1, at seeds that count up."""
    batch_size: int = 1
    """Videos of one size and setting made at once, at least 1, if they fit; alone or together differ in last bits."""

    EMBEDDINGS: ClassVar[str] = "Embeddings from a cache"
    cache: str | None = None
    """Cache that holds the prompts' embeddings, such as those of --validation_prompt: T5 is not needed then."""
    dataset: str = "default"
    """Data set of that cache."""

    MEMORY: ClassVar[str] = "Precision and memory"
    preset: Literal["quality", "balanced", "low", "lowest"] | None = None
    """How much memory to take, by several levers at once; their own flags win. Default: balanced; on a CPU quality."""
    offload: Literal["none", "model", "sequential", "group"] | None = None
    """What waits on the host: whole models, all but one layer, or all but two blocks, copied ahead; default: preset."""
    vae_tiling: Literal["on", "off"] | None = None
    """Decode tile by tile, in far less memory; tiles blend at their seams. Default: the preset's."""
    vae_slicing: Literal["on", "off"] | None = None
    """Decode the videos of a batch one by one; default: the preset's."""
    transformer_precision: Literal["native", "int8", "fp8"] | None = None
    """Bits of the transformer's weights; fp8 needs an Ada GPU or a newer one. Default: the preset's."""
    text_encoder_precision: Literal["native", "int8", "fp8"] | None = None
    """The same of T5's weights; default: the preset's."""
    vae_precision: Literal["native", "int8", "fp8"] | None = None
    """The same of the VAE's weights; default: native."""
    quantiser: Literal["torchao", "quanto"] | None = None
    """Library that makes int8 and fp8; default: torchao."""
    layerwise_casting: bool = False
    """Hold the transformer's weights in float8 and cast each as it is needed, on any device."""
    compile: bool = False
    """Compile the transformer's blocks: a minute at first, then faster."""
    device_map: Literal["balanced"] | None = None
    """Split the models over all GPUs, in equal shares."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the models run in; auto: as in training, else as their weights are stored (float16 on a CPU: float32)."""
    allow_dtype: bool = False
    """Run a checkpoint that is stored in bfloat16 in float16, whose largest number is 65504, all the same."""
    OUTPUT: ClassVar[str] = "Output"
    output_dir: str = "videos"
    """Folder of the videos and their recipes, made when it is not there."""

    def __post_init__(self) -> None:
        if isinstance(self.lora, str):  # its letters would be taken for LoRAs
            object.__setattr__(self, "lora", (self.lora,))
        self.check_numbers()
        if self.recipe is not None:
            self._check_recipe()
            return
        if not self.lora and self.pretrained_model_name_or_path is None:
            raise ConfigError("--lora is missing; give a run's folder, or --pretrained_model_name_or_path for no LoRA")
        if (self.prompt is None) == (self.prompts is None):
            raise ConfigError("give either --prompt TEXT or --prompts FILE, a prompt a line")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError(f"--prompt {self.prompt!r}; must not be empty")
        if not self.lora and self.lora_scale != 1:
            raise ConfigError(f"--lora_scale {self.lora_scale}: there is no LoRA to scale; give --lora")
        if self.compare is not None:
            if not self.lora:
                raise ConfigError(f"--compare {self.compare}: there is no LoRA to compare with; give --lora")
            if self.lora_scale != 1:
                raise ConfigError(f"--lora_scale {self.lora_scale} with --compare {self.compare}; give one of them")
            self.scales()

    def check_numbers(self) -> None:
        """Refuse numbers that are out of their ranges.

        Raises:
            ConfigError: as said.
        """
        if not math.isfinite(self.lora_scale):
            raise ConfigError(f"--lora_scale {self.lora_scale}; must be a finite number")
        if not 1 <= self.num_inference_steps <= 1000:
            raise ConfigError(f"--num_inference_steps {self.num_inference_steps}; must be 1 to 1000")
        if not 0 <= self.guidance_scale < math.inf:
            raise ConfigError(f"--guidance_scale {self.guidance_scale}; must be a number of 0 or more, such as 6")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}; must be 0 to 2^63 - 1")
        for name in ("num_videos", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)}; must be at least 1")
        if self.fps is not None and not 1 <= self.fps <= 1000:
            raise ConfigError(f"--fps {self.fps}; must be 1 to 1000 frames per second, such as 8")

    def _check_recipe(self) -> None:
        """Of a recipe's video, only where things lie may be said.

        Raises:
            ConfigError: another flag was given, too.
        """
        for field in fields(self):
            if field.name not in PLACES and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"--{field.name} {getattr(self, field.name)} with --recipe, which says it; leave it out"
                )

    def scales(self) -> list[float]:
        """The strengths to make each video at.

        Raises:
            ConfigError: `--compare` cannot be read as two or more of them.
        """
        if self.compare is None:
            return [self.lora_scale]
        try:
            scales = [0.0 if word.strip() == "base" else float(word) for word in self.compare.split(",")]
        except ValueError:
            scales = []
        if len(scales) < 2 or len(set(scales)) < len(scales) or not all(map(math.isfinite, scales)):
            raise ConfigError(
                f"--compare {self.compare}; must be two or more different strengths, such as base,0.5,1.0"
            )
        return scales

    def rows(self) -> list[PromptRow]:
        """What is asked for, a row a video, in order.

        Raises:
            ConfigError: the file cannot be read, a row cannot be used, or there is none.
        """
        if self.prompts is None:
            assert self.prompt is not None
            return [PromptRow(self.prompt.strip())]
        return read_prompts(self.prompts, "--prompts")
