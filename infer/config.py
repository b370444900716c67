"""What `python -m infer` can be told: one field a flag."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from shared.errors import ConfigError


@dataclass(frozen=True)
class InferConfig:
    """Stage 3: a LoRA and prompts become videos, each with a recipe that makes it again."""

    lora: str | None = None
    """LoRA: a run's folder, a checkpoint-<step> folder or a file; left out: the base model alone."""
    lora_scale: float = 1.0
    """Strength of the LoRA: 1 as it was trained (alpha is in the file), 0 the base model."""
    prompt: str | None = None
    """Text to make a video of."""
    prompts: str | None = None
    """In place of --prompt: a text file, a prompt a line."""
    id_token: bool = True
    """Put the LoRA's id token before each prompt, unless it is there already."""

    pretrained_model_name_or_path: str | None = None
    """Checkpoint: a folder or a hub id such as THUDM/CogVideoX-2b; default: what the LoRA was trained on."""
    revision: str | None = None
    """Branch, tag or commit of the checkpoint on the hub; default: the LoRA's, where it names the checkpoint."""
    variant: str | None = None
    """Variant of the weight files, such as fp16; default: the LoRA's, where it names the checkpoint."""
    cache_dir: str | None = None
    """Where the hub's files are kept; default: the hub's own place."""

    height: int | None = None
    """Height in pixels, a multiple of 16; default: what the LoRA was trained at, else the checkpoint's own."""
    width: int | None = None
    """Width in pixels, a multiple of 16; default: what the LoRA was trained at, else the checkpoint's own."""
    num_frames: int | None = None
    """Frames, 4k + 1; default: what the LoRA was trained at, else the checkpoint's own."""
    fps: float | None = None
    """Frames per second of the file; default: what the LoRA was trained at, else the checkpoint's own."""

    num_inference_steps: int = 50
    """Denoising steps, 1 to 1000."""
    guidance_scale: float = 6.0
    """How strongly the prompt guides (classifier-free guidance); 1 or less: not at all, in half the time."""
    use_dynamic_cfg: bool = False
    """Vary the guidance from step to step as diffusers does; it is no ramp there (see docs)."""
    seed: int = 42
    """Seed of each video's noise."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What the models run in; auto: as in training, else as their weights are stored (float16 on a CPU: float32)."""
    output_dir: str = "videos"
    """Folder of the videos and their recipes, made when it is not there."""

    def __post_init__(self) -> None:
        if self.lora is None and self.pretrained_model_name_or_path is None:
            raise ConfigError("--lora is missing; give a run's folder, or --pretrained_model_name_or_path for no LoRA")
        if (self.prompt is None) == (self.prompts is None):
            raise ConfigError("give either --prompt TEXT or --prompts FILE, a prompt a line")
        if self.prompt is not None and not self.prompt.strip():
            raise ConfigError(f"--prompt {self.prompt!r}; must not be empty")
        if self.lora is None and self.lora_scale != 1:
            raise ConfigError(f"--lora_scale {self.lora_scale}: there is no LoRA to scale; give --lora")
        if not math.isfinite(self.lora_scale):
            raise ConfigError(f"--lora_scale {self.lora_scale}; must be a finite number")
        if not 1 <= self.num_inference_steps <= 1000:
            raise ConfigError(f"--num_inference_steps {self.num_inference_steps}; must be 1 to 1000")
        if not 0 <= self.guidance_scale < math.inf:
            raise ConfigError(f"--guidance_scale {self.guidance_scale}; must be a number of 0 or more, such as 6")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed {self.seed}; must be 0 to 2^63 - 1")
        if self.fps is not None and not 1 <= self.fps <= 1000:
            raise ConfigError(f"--fps {self.fps}; must be 1 to 1000 frames per second, such as 8")

    def texts(self) -> list[str]:
        """The prompts as the user gave them, without the space around them; empty lines of a file are none.

        Raises:
            ConfigError: the file cannot be read as text, or holds no prompt.
        """
        if self.prompts is None:
            assert self.prompt is not None
            return [self.prompt.strip()]
        try:
            lines = Path(self.prompts).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts {self.prompts}: cannot be read as UTF-8 text ({error})") from error
        texts = [line.strip() for line in lines if line.strip()]
        if not texts:
            raise ConfigError(f"--prompts {self.prompts}: holds no prompt; write one a line")
        return texts
