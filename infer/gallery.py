"""`index.html` of a folder of videos: each played in place, with its recipe, by prompt; those of one seed side by side.

Reads the recipes' JSON beside the videos, also those of earlier runs; writes the page by rename. Other files may lie
there: what is no recipe is left out, and named on the page where a video lies beside it.
"""

from __future__ import annotations

import fcntl
import json
import shlex
from pathlib import Path
from typing import Any

from shared.lora import FILE_NAME
from shared.page import render_page, video_cell
from shared.storage import write_atomically

HERE = Path(__file__).resolve().parent
FILE, LOCK = "index.html", ".index.lock"
AGAIN = "again"  # folder in the folder, for videos that are made again: the first ones stay
LARGEST = 2**63  # that a number of a recipe can be
NUMBERS = ("seed", "frames", "height", "width", "fps", "num_inference_steps", "guidance_scale", "lora_scale")
SHOWN_ELSEWHERE = {"prompt", "seed"}  # than in the list of a recipe's settings


def write_gallery(folder: Path) -> Path:
    """Write the page of the videos in a folder. Returns its path.

    Of several processes that write there one waits for the other, so that the last page holds all videos.
    """
    place = folder / FILE
    with (folder / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        recipes, unread = read_recipes(folder)
        prompts = group_videos(recipes, place)
        html = render_page(
            HERE, "gallery", kind="Videos", title=folder.resolve().name, prompts=prompts, unread=unread,
            count=len(recipes),
        )  # fmt: skip
        write_atomically(place, html)
    return place


def read_recipes(folder: Path) -> tuple[dict[Path, dict[str, Any]], list[str]]:
    """The recipes of the videos in a folder, by the videos' paths; and the names of videos beside something else."""
    recipes, unread = {}, []
    for path in sorted(folder.glob("*.json")):
        video = path.with_suffix(".mp4")
        if not video.is_file():
            continue
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            value = None
        if _is_recipe(value):
            recipes[video] = value
        else:
            unread.append(video.name)
    return recipes, unread


def group_videos(recipes: dict[Path, dict[str, Any]], place: Path) -> list[dict[str, Any]]:
    """The videos by prompt: rows of a seed each, or one row of all seeds where none has more than one video.

    In a row the base model comes first, then LoRAs by step and strength, then what stands side by side in one video.

    Args:
        place: where the page will lie.
    """
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for video, recipe in sorted(recipes.items(), key=lambda pair: _order(pair[1])):
        seeds = found.setdefault(recipe["prompt"], {})
        seeds.setdefault(recipe.get("seed", 0), []).append(_card(video, recipe, place))
    return [{"prompt": prompt, "rows": _rows(seeds)} for prompt, seeds in found.items()]


def _rows(seeds: dict[int, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    if all(len(videos) == 1 for videos in seeds.values()):
        return [{"seed": None, "videos": [seeds[seed][0] for seed in sorted(seeds)]}]
    return [{"seed": seed, "videos": seeds[seed]} for seed in sorted(seeds)]


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
    return shlex.join(["python", "-m", "infer", "--recipe", str(path), "--output_dir", str(path.parent / AGAIN)])


def _card(video: Path, recipe: dict[str, Any], place: Path) -> dict[str, Any]:
    size = (recipe["width"], recipe["height"]) if recipe.get("width") and recipe.get("height") else None
    return {
        "cell": video_cell(video, place, video.stat().st_size, size),
        "is_side_by_side": "compare" in recipe,
        "ratio": size and size[0] / size[1],
        "seed": recipe.get("seed"),
        "weights": weights(recipe),
        "told": _told(recipe),
        "command": command(recipe, video.with_suffix(".json")),
        "settings": _settings(recipe),
    }


def _loras(recipe: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
    """A recipe's LoRAs, each with its strength; none where that is 0."""
    pairs = [(lora, lora["weight"] * recipe["lora_scale"]) for lora in recipe.get("loras", ())]
    return [(lora, strength) for lora, strength in pairs if strength]


def _step(lora: dict[str, Any]) -> int | None:
    """The step that it was trained to, where it says."""
    step: int | None = (lora.get("latentreel") or {}).get("step")
    return step


def _lora_words(lora: dict[str, Any], strength: float) -> str:
    step = "" if _step(lora) is None else f", step {_step(lora):,}"
    return f"{_lora_name(lora)}{step}, weight {strength:g}"


def _lora_name(lora: dict[str, Any]) -> str:
    """How people call it: the hub's name, the file's, or, where that is every LoRA's, the run's."""
    if lora.get("hub"):
        return str(lora["hub"]).partition("@")[0].removesuffix(f"/{FILE_NAME}")
    path = Path(lora["path"])
    if path.name != FILE_NAME:
        return path.stem
    run = path.parent.parent if path.parent.name.startswith("checkpoint-") else path.parent
    return run.name or path.stem


def _order(recipe: dict[str, Any]) -> tuple[Any, ...]:
    loras = _loras(recipe)
    steps = [_step(lora) or 0 for lora, _ in loras]
    prompt = recipe["prompt"]
    return prompt.casefold(), prompt, "compare" in recipe, len(loras), steps, [strength for _, strength in loras]


def _told(recipe: dict[str, Any]) -> str:
    """Size, rate and sampling in one line."""
    size = "x".join(str(recipe[name]) for name in ("frames", "height", "width") if name in recipe)
    parts = [size, f"{recipe['fps']:g} fps" if "fps" in recipe else ""]
    parts += [f"{recipe['num_inference_steps']} steps" if "num_inference_steps" in recipe else ""]
    parts += [f"guidance {recipe['guidance_scale']:g}" if "guidance_scale" in recipe else ""]
    return ", ".join(part for part in parts if part)


def _settings(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """What a recipe says, a line each, without what is in it of many parts."""
    told = []
    if isinstance(model := recipe.get("model"), dict):
        told.append(("model", str(model.get("name"))))
    told += [("lora", f"{lora.get('hub') or lora['path']}:{lora['weight']:g}") for lora in recipe.get("loras", ())]
    for name, value in recipe.items():
        if name in SHOWN_ELSEWHERE or value in (None, "") or isinstance(value, dict | list):
            continue
        told.append((name, f"{value:g}" if isinstance(value, float) else _flag(value)))
    return told


def _flag(value: Any) -> str:
    """A value as TOML has it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_recipe(value: Any) -> bool:
    """Whether what the page reads of a recipe is there and of its type; older recipes may say less."""
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        return False
    if not all(_is_number(value[name]) for name in NUMBERS if name in value):
        return False
    if "compare" in value and not (
        isinstance(value["compare"], list)
        and all(isinstance(one, dict) and isinstance(one.get("label"), str) for one in value["compare"])
    ):
        return False
    loras = value.get("loras", [])
    return isinstance(loras, list) and all(map(_is_lora, loras)) and (not loras or "lora_scale" in value)


def _is_lora(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("path"), str) or not _is_number(value.get("weight")):
        return False
    facts = value.get("latentreel") or {}
    return isinstance(facts, dict) and (facts.get("step") is None or _is_number(facts["step"]))


def _is_number(value: Any) -> bool:
    """Whether it is one that a recipe can hold; not NaN, nor so large that it cannot be shown."""
    return type(value) in (int, float) and abs(value) <= LARGEST
