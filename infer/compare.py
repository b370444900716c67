"""Videos side by side in one: the same seed at several strengths of the LoRA, each with its strength above it.

Shapes: F frames, H and W height and width in pixels, N videos.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from infer.recipe import Recipe
from infer.video import read_mp4, write_mp4
from shared.storage import digest_of, write_atomically

GAP = 4  # between two videos; pixels
BLOCK = 16  # of x264; a strip of whole blocks leaves the videos' own where they were
MARGIN = 2  # to each side of what is written in the strip, at least; pixels
SMALLEST = 8  # that a letter may be to be read; pixels


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
        first, count = self.recipes[0], len(self.recipes)
        told = {
            "prompt": first.prompt,
            "effective_prompt": first.effective_prompt,
            "seed": first.seed,
            "group": first.group,
            "compare": [{"name": recipe.name, "label": label(recipe.lora_scale)} for recipe in self.recipes],
            "frames": first.frames,
            "height": strip_height(first.width) + first.height,
            "width": count * (first.width + GAP) - GAP,
            "fps": first.fps,
        }
        return json.dumps(told, indent=2, ensure_ascii=False) + "\n"

    def is_made(self, folder: Path) -> bool:
        """Whether it is there, and complete."""
        path = folder / f"{self.name}.json"
        return path.exists() and path.with_suffix(".mp4").exists() and path.read_bytes() == self.to_json().encode()

    def make(self, folder: Path, fps: Fraction) -> None:
        """Write it, of the videos that are in the folder: the same whichever of them were there before."""
        videos = [read_mp4(folder / f"{recipe.name}.mp4") for recipe in self.recipes]
        write_mp4(folder / f"{self.name}.mp4", side_by_side(videos, [label(r.lora_scale) for r in self.recipes]), fps)
        write_atomically(folder / f"{self.name}.json", self.to_json())


def label(scale: float) -> str:
    """How a strength is called."""
    return "base" if scale == 0 else f"LoRA {scale:g}"


def strip_height(width: int) -> int:
    """Height of the strip that says the strength above a video of this width: a large one is shown smaller."""
    return math.ceil(width / 12 / BLOCK) * BLOCK


def side_by_side(videos: list[np.ndarray], labels: list[str]) -> np.ndarray:
    """Frames [F, S + H, N W + (N - 1) GAP, 3] of N videos [F, H, W, 3] of one shape, each under a strip of height S."""
    frames, height, width = videos[0].shape[:3]
    top = strip_height(width)
    canvas = np.zeros((frames, top + height, len(videos) * (width + GAP) - GAP, 3), np.uint8)
    for number, (video, text) in enumerate(zip(videos, labels, strict=True)):
        left = number * (width + GAP)
        canvas[:, :top, left : left + width] = strip(text, top, width)
        canvas[:, top:, left : left + width] = video
    return canvas


def strip(text: str, height: int, width: int) -> np.ndarray:
    """Pixels [height, width, 3] that say a strength; where the whole does not fit, its number alone, all of it."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (width, height))
    draw = ImageDraw.Draw(image)
    usual = height * 5 // 8
    for words, size in [(words, size) for words in (text, text.split()[-1]) for size in range(usual, SMALLEST - 1, -1)]:
        font = ImageFont.load_default(size)
        left, _, right, _ = draw.textbbox((0, 0), words, font=font)
        if right - left <= width - 2 * MARGIN:
            break
    margin = max(0, min(8, (width - (right - left)) / 2))
    draw.text((margin - left, height // 2), words, fill="white", anchor="lm", font=font)
    return np.asarray(image)
