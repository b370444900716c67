"""Videos side by side in one: the same seed at several strengths of the LoRA, each with its strength above it.

Shapes: F frames, H and W height and width in pixels, N videos.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from infer.recipe import Recipe
from infer.video import read_mp4, write_mp4
from shared.storage import digest_of, write_atomically

STRIP = 32  # height of the strip that says the strength; pixels
GAP = 4  # between two videos; pixels


@dataclass(frozen=True)
class Comparison:
    """Recipes of one group, in the order that they stand in."""

    recipes: tuple[Recipe, ...]

    @property
    def name(self) -> str:
        """The name of its files, without the suffix."""
        first, digest = self.recipes[0], digest_of([recipe.identity() for recipe in self.recipes], 4).hex()
        return f"{first.slug}-{digest}-compare-seed{first.seed}"

    def to_json(self) -> str:
        """The text of the JSON beside the video: what stands in it, from left to right."""
        first = self.recipes[0]
        told = {
            "prompt": first.prompt,
            "effective_prompt": first.effective_prompt,
            "seed": first.seed,
            "group": first.group,
            "compare": [{"name": recipe.name, "label": label(recipe.lora_scale)} for recipe in self.recipes],
        }
        return json.dumps({**told, "fps": first.fps}, indent=2, ensure_ascii=False) + "\n"

    def is_made(self, folder: Path) -> bool:
        """Whether it is there, and complete."""
        path = folder / f"{self.name}.json"
        return path.exists() and path.with_suffix(".mp4").exists() and path.read_text("utf-8") == self.to_json()

    def make(self, folder: Path, fps: Fraction) -> None:
        """Write it, of the videos that are in the folder: the same whichever of them were there before."""
        videos = [read_mp4(folder / f"{recipe.name}.mp4") for recipe in self.recipes]
        write_mp4(folder / f"{self.name}.mp4", side_by_side(videos, [label(r.lora_scale) for r in self.recipes]), fps)
        write_atomically(folder / f"{self.name}.json", self.to_json())


def label(scale: float) -> str:
    """How a strength is called."""
    return "base" if scale == 0 else f"LoRA {scale:g}"


def side_by_side(videos: list[np.ndarray], labels: list[str]) -> np.ndarray:
    """Frames [F, STRIP + H, N W + (N - 1) GAP, 3] of N videos [F, H, W, 3] of one shape, each under its label."""
    from PIL import Image, ImageDraw, ImageFont

    frames, height, width = videos[0].shape[:3]
    canvas = np.zeros((frames, STRIP + height, len(videos) * (width + GAP) - GAP, 3), np.uint8)
    for number, (video, text) in enumerate(zip(videos, labels, strict=True)):
        left = number * (width + GAP)
        strip = Image.new("RGB", (width, STRIP))
        ImageDraw.Draw(strip).text((8, STRIP // 2), text, fill="white", anchor="lm", font=ImageFont.load_default(18))
        canvas[:, :STRIP, left : left + width] = np.asarray(strip)
        canvas[:, STRIP:, left : left + width] = video
    return canvas
