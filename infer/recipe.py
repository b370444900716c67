"""What a video is made from: all it takes to make it again, and the name that follows from it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shared.cache import embedding_key
from shared.errors import ConfigError

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
