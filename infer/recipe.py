"""What a video is made from: all it takes to make it again, and the name that follows from it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from infer.config import InferConfig
from infer.lora import Lora
from shared.cache import embedding_key
from shared.errors import ConfigError
from shared.geometry import SIDE_MULTIPLE, Bucket
from shared.lora import LoraFacts
from shared.models import Checkpoint, choose_device, choose_dtype

SLUG_LENGTH = 40  # characters of the prompt in a file's name
PACKAGES = ("torch", "diffusers", "transformers", "peft", "av")
# Of a recipe, what may differ from that of a video of the same name which is made anew.
NOT_ASKED = {"versions", "device", "frames_sha256"}


@dataclass(frozen=True)
class Recipe:
    """One video; the JSON beside it holds these fields under these names."""

    prompt: str
    effective_prompt: str
    negative_prompt: str
    seed: int
    frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    use_dynamic_cfg: bool
    lora_scale: float
    lora: dict[str, Any] | None
    model: dict[str, Any]
    scheduler: dict[str, Any]
    dtype: str
    text_dtype: str
    cache_dtype: str
    device: str
    vae_tiling: bool

    @property
    def name(self) -> str:
        """The name of its files, without the suffix: another for each prompt, step, scale and seed."""
        slug = re.sub(r"\W+", "-", self.prompt.lower())[:SLUG_LENGTH].strip("-") or "video"
        weights = "base"
        if self.lora is not None:
            facts = self.lora["latentreel"]
            weights = f"{'lora' if facts is None else 'step' + str(facts['step'])}-scale{self.lora_scale:g}"
        return f"{slug}-{embedding_key(self.effective_prompt).hex()[:8]}-{weights}-seed{self.seed}"

    def to_json(self, frames_sha256: str) -> str:
        """The text of the JSON beside the video.

        Args:
            frames_sha256: of the uint8 frames [F, H, W, 3] that the video was compressed from.
        """
        made = {"versions": {name: version(name) for name in PACKAGES}, "frames_sha256": frames_sha256}
        return json.dumps({**asdict(self), **made}, indent=2, ensure_ascii=False) + "\n"

    def check_free(self, path: Path) -> None:
        """Refuse to replace the video of another recipe.

        Args:
            path: of the JSON that this recipe would be written to.

        Raises:
            ConfigError: what is there was made from something else; names it.
        """
        if not path.exists():
            return
        old, new = json.loads(path.read_text(encoding="utf-8")), json.loads(self.to_json(""))
        differing = [name for name in new if name not in NOT_ASKED and old.get(name) != new[name]]
        if differing:
            raise ConfigError(f"{path}: is there, of another {', '.join(differing)}; give another --output_dir")


def effective_prompt(prompt: str, id_token: str | None) -> str:
    """The text that is encoded: the id token, one space, the prompt; the prompt alone when it begins with the token."""
    token = (id_token or "").strip()
    words = token.split()
    return prompt if prompt.split()[: len(words)] == words else f"{token} {prompt}"


def choose_bucket(config: InferConfig, checkpoint: Checkpoint, facts: LoraFacts | None) -> Bucket:
    """The shape to make: what was asked for, else what the LoRA was trained at, else the checkpoint's own.

    Raises:
        ConfigError: the checkpoint cannot make it.
    """
    model = checkpoint.facts
    frames, height, width = model.sample_frames, *model.native_size
    if facts is not None:
        frames, height, width = facts.frames, facts.height, facts.width
    bucket = Bucket(
        frames=frames if config.num_frames is None else config.num_frames,
        height=height if config.height is None else config.height,
        width=width if config.width is None else config.width,
    )
    if model.patch_size_t is not None:  # 1.5 has a table of positions, and none beyond its end
        for name, side, sample in (
            ("height", bucket.height, model.sample_height),
            ("width", bucket.width, model.sample_width),
        ):
            most = sample // model.patch_size * SIDE_MULTIPLE
            if side > most:
                raise ConfigError(f"--{name} {side}: {checkpoint.name} has positions up to {most} pixels; use less")
    return bucket


def make_recipes(config: InferConfig, checkpoint: Checkpoint, lora: Lora | None) -> list[Recipe]:
    """A recipe for each prompt, in order; a prompt that is given twice has one.

    Precision is what the LoRA met in training, so that it meets the same embeddings and the same base again.
    """
    facts = lora.facts if lora else None
    if facts:
        fps, token = facts.fps, facts.id_token
        dtype, text_dtype, cache_dtype = facts.dtype, facts.text_dtype, facts.cache_dtype
    else:
        fps, token = float(checkpoint.facts.native_fps), None
        dtype, text_dtype = checkpoint.stored_dtype("transformer"), checkpoint.stored_dtype("text_encoder")
        cache_dtype = "float16"
    bucket, device = choose_bucket(config, checkpoint, facts), choose_device()
    model = {name: getattr(checkpoint, name) for name in ("name", "revision", "variant")}
    recipes: dict[str, Recipe] = {}
    for prompt in config.texts():
        text = effective_prompt(prompt, token if config.id_token else None)
        recipe = Recipe(
            prompt=prompt,
            effective_prompt=text,
            negative_prompt="",
            seed=config.seed,
            frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            fps=fps if config.fps is None else config.fps,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            use_dynamic_cfg=config.use_dynamic_cfg,
            lora_scale=config.lora_scale,
            lora=lora.describe() if lora else None,
            model={**model, "kind": checkpoint.facts.kind},
            scheduler=checkpoint.config("scheduler"),
            dtype=choose_dtype(config.dtype, dtype),
            text_dtype=choose_dtype(config.dtype, text_dtype),
            cache_dtype=cache_dtype,
            device=device,
            vae_tiling=device == "cuda",
        )
        recipes.setdefault(text, recipe)
    return list(recipes.values())
