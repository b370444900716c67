"""What a video is made from: all it takes to make it again, and the name that follows from it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.storage import digest_of

SLUG_LENGTH = 40  # characters of the prompt in a file's name
PACKAGES = ("torch", "diffusers", "transformers", "peft", "av")
# Of a recipe, what may differ between two videos that are asked for as one.
NOT_ASKED = {"device", "versions", "frames_sha256", "batch_size", "group"}


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
    lora_scale: float  # of all LoRAs, beside the weight of each
    loras: list[dict[str, Any]]  # as `Lora.describe` has them
    model: dict[str, Any]
    scheduler: dict[str, Any]
    dtype: str
    text_dtype: str
    cache_dtype: str
    device: str
    vae_tiling: bool
    image: dict[str, Any] | None = None  # path and sha256 of what the video starts from
    image_factor: str | None = None  # as in the LoRA's training; None: text-to-video, or as the pipeline does
    drop_learned_positions: bool = False
    levers: dict[str, Any] = field(default_factory=dict)  # of infer/memory.py, those that change the frames

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """The recipe in a JSON file beside a video.

        Raises:
            ConfigError: there is none, or of another version.
        """
        told = _read_json(path)
        missing = [field.name for field in fields(cls) if field.name not in told]
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
            raise ConfigError(f"--recipe {path}: is no recipe of this version: has no {some}; give the JSON of a video")
        return cls(**{field.name: told[field.name] for field in fields(cls)})

    def identity(self) -> dict[str, Any]:
        """What the video is made from, wherever that lies: recipes of one identity are of one video."""
        told = {name: value for name, value in asdict(self).items() if name not in NOT_ASKED}
        told["loras"] = [[lora["sha256"], lora["weight"]] for lora in self.loras]
        told["image"] = self.image and self.image["sha256"]
        return told

    @property
    def group(self) -> str:
        """The same for videos that differ in nothing but the strength of their LoRAs."""
        return digest_of({**self.identity(), "lora_scale": None}, 4).hex()

    @property
    def slug(self) -> str:
        """The beginning of the names of its files: the prompt's."""
        return re.sub(r"\W+", "-", self.prompt.lower())[:SLUG_LENGTH].strip("-") or "video"

    @property
    def name(self) -> str:
        """The name of its files, without the suffix: it holds a digest of the identity."""
        weights = "base"
        if len(self.loras) == 1:
            facts, scale = self.loras[0]["latentreel"], self.lora_scale * self.loras[0]["weight"]
            weights = f"{'lora' if facts is None else 'step' + str(facts['step'])}-scale{scale:g}"
        elif self.loras:
            weights = f"{len(self.loras)}loras-scale{self.lora_scale:g}"
        return f"{self.slug}-{digest_of(self.identity(), 4).hex()}-{weights}-seed{self.seed}"

    def to_json(self, frames_sha256: str, batch_size: int) -> str:
        """The text of the JSON beside the video.

        Args:
            frames_sha256: of the uint8 frames [F, H, W, 3] that the video was compressed from.
            batch_size: of the batch that it was made in.
        """
        made: dict[str, Any] = {"group": self.group, "batch_size": batch_size, "frames_sha256": frames_sha256}
        made["versions"] = {name: version(name) for name in PACKAGES}
        return json.dumps({**asdict(self), **made}, indent=2, ensure_ascii=False) + "\n"

    def is_made(self, folder: Path) -> bool:
        """Whether the video is there. The JSON is written last: where it stands, the video is complete.

        Raises:
            ConfigError: what has its name was made from something else.
        """
        path = folder / f"{self.name}.json"
        if not path.exists() or not path.with_suffix(".mp4").exists():
            return False
        if Recipe.read(path).identity() != self.identity():
            raise ConfigError(f"{path}: is there, of another video; give another --output_dir")
        return True


def frames_digest_in(path: Path) -> str:
    """The sha256 of the frames that a recipe's video was compressed from.

    Raises:
        ConfigError: the JSON does not say.
    """
    digest = _read_json(path).get("frames_sha256")
    if not isinstance(digest, str):
        raise ConfigError(f"--recipe {path}: has no frames_sha256; give the JSON beside a video")
    return digest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--recipe {path}: cannot be read ({error.strerror}); give the JSON beside a video"
        ) from error
    except ValueError as error:
        raise ConfigError(f"--recipe {path}: cannot be read as JSON ({error}); give the JSON beside a video") from error
    if not isinstance(told, dict):
        raise ConfigError(f"--recipe {path}: is no recipe; give the JSON beside a video")
    return told
