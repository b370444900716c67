"""`index.html` of a folder of videos: each played in place, with its recipe; those of one prompt and seed side by side.

Reads the recipes' JSON beside the videos, also those of earlier runs; writes the page by rename. What cannot be read as
a recipe is left out.
"""

from __future__ import annotations

import fcntl
import json
import shlex
from pathlib import Path
from typing import Any

from shared.page import render_page, video_cell
from shared.storage import write_atomically

HERE = Path(__file__).resolve().parent
FILE, LOCK = "index.html", ".index.lock"


def write_gallery(folder: Path) -> Path:
    """Write the page of the videos in a folder. Returns its path.

    Of several processes that write there one waits for the other, so that the last page holds all videos.
    """
    place = folder / FILE
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        groups = group_videos(folder)
        count = sum(len(group["videos"]) for group in groups)
        html = render_page(HERE, "gallery", kind="Videos", title=folder.resolve().name, groups=groups, count=count)
        write_atomically(place, html)
    return place


def group_videos(folder: Path) -> list[dict[str, Any]]:
    """The videos by prompt and seed; in a group the base model comes first, then LoRAs by step and strength."""
    found: dict[tuple[str, Any], list[tuple[Any, dict[str, Any]]]] = {}
    for path in sorted(folder.glob("*.json")):
        recipe, video = _read(path), path.with_suffix(".mp4")
        if recipe is None or not video.is_file():
            continue
        card = {
            "cell": video_cell(video, folder / FILE, video.stat().st_size),
            "weights": weights(recipe),
            "command": command(recipe, path),
            "settings": [(name, str(value)) for name, value in recipe.items() if not isinstance(value, dict | list)],
            "shape": f"{recipe.get('width', 3)} / {recipe.get('height', 2)}",
            "told": _told(recipe),
        }
        found.setdefault((recipe["prompt"], recipe.get("seed")), []).append((_order(recipe), card))
    return [
        {"prompt": prompt, "seed": seed, "videos": [card for _, card in sorted(cards, key=lambda pair: pair[0])]}
        for (prompt, seed), cards in found.items()
    ]


def weights(recipe: dict[str, Any]) -> str:
    """What made a video, in a few words: the base model, or LoRAs with their steps and strengths."""
    if "compare" in recipe:
        return "side by side: " + ", ".join(one["label"] for one in recipe["compare"])
    return " + ".join(_lora_words(lora, strength) for lora, strength in _loras(recipe)) or "base model"


def command(recipe: dict[str, Any], path: Path) -> str:
    """The command that makes a video again, to the last bit on a CPU; none for what stands side by side.

    Args:
        path: of the recipe.
    """
    if "compare" in recipe:
        return ""
    path = path.resolve()
    return shlex.join(["python", "-m", "infer", "--recipe", str(path), "--output_dir", str(path.parent)])


def _loras(recipe: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """A recipe's LoRAs, each with its strength; none where that is 0."""
    pairs = [(lora, lora["weight"] * recipe["lora_scale"]) for lora in recipe.get("loras", ())]
    return [(lora, strength) for lora, strength in pairs if strength]


def _lora_words(lora: dict[str, Any], strength: float) -> str:
    path, facts = Path(lora["path"]), lora.get("latentreel") or {}
    step = f", step {facts['step']:,}" if facts.get("step") is not None else ""
    return f"{path.parent.name or path.stem}{step}, weight {strength:g}"


def _order(recipe: dict[str, Any]) -> tuple[Any, ...]:
    loras = _loras(recipe)
    steps = [(lora.get("latentreel") or {}).get("step") or 0 for lora, _ in loras]
    return "compare" in recipe, len(loras), steps, [strength for _, strength in loras]


def _told(recipe: dict[str, Any]) -> str:
    """Size, rate and sampling in one line."""
    size = "x".join(str(recipe[name]) for name in ("frames", "height", "width") if name in recipe)
    parts = [size, f"{recipe['fps']:g} fps" if "fps" in recipe else ""]
    parts += [f"{recipe['num_inference_steps']} steps" if "num_inference_steps" in recipe else ""]
    parts += [f"guidance {recipe['guidance_scale']:g}" if "guidance_scale" in recipe else ""]
    return ", ".join(part for part in parts if part)


def _read(path: Path) -> dict[str, Any] | None:
    """The recipe that a file holds; None where it holds something else, or has just been removed."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) and isinstance(value.get("prompt"), str) else None
