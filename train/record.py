"""What a run left in its folder beside its curves: what it was told, its LoRA's facts, its validation videos."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from shared.lora import FILE_NAME, LoraFacts, read_metadata
from shared.storage import canonical_json, digest_of
from train.curves import Curves, read_curves, read_holdout
from train.metrics import FILE

# Of a recipe, what a row of validation may say.
ASKED = (
    "effective_prompt", "seed", "frames", "height", "width", "num_inference_steps", "guidance_scale", "use_dynamic_cfg",
    "lora_scale",
)  # fmt: skip


@dataclass(frozen=True)
class ValidationVideo:
    """A video that a run made of a prompt, at one of its steps.

    Attributes:
        name: of its files, without the suffix.
        prompt: None where no JSON beside it tells.
        size_bytes: None where there is a JSON, but no video.
        row: digest of what was asked for, whatever LoRA it was made with: the same at all steps of a run.
        size: width and height in pixels; None where no JSON tells.
    """

    step: int
    name: str
    path: Path
    prompt: str | None
    seed: int | None
    size_bytes: int | None
    row: str
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Record:
    """A run, as its folder tells it.

    Attributes:
        config: what it was told; empty where it does not say.
        lora: of the finished LoRA, else of the last checkpoint's; None where there is neither yet.
        holdout: rows of holdout.jsonl.
        finished: whether the LoRA of its last step is there.
        written: when its last row was, in seconds since 1970.
    """

    folder: Path
    name: str
    curves: Curves
    holdout: list[dict[str, Any]]
    config: dict[str, Any]
    lora: LoraFacts | None
    videos: list[ValidationVideo]
    finished: bool
    written: float


def read_record(folder: Path) -> Record:
    """Read a run's folder, also while the run goes on.

    Raises:
        UserError: it is none, or a file in it is not what a run writes.
    """
    curves = read_curves(folder)
    lora, finished = _lora_of(folder, curves.last_step)
    return Record(
        folder=folder,
        name=folder.resolve().name,
        curves=curves,
        holdout=read_holdout(folder),
        config=read_flags(folder),
        lora=lora,
        videos=read_videos(folder),
        finished=finished,
        written=(folder / FILE).stat().st_mtime,
    )


def read_flags(folder: Path) -> dict[str, Any]:
    """What a run was told; empty where its folder does not say.

    Raises:
        ConfigError: config.json is something else.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    told = _json_object(path)
    if told is None:
        raise ConfigError(f"{path}: is not a JSON object; mend or remove it")
    return told


def _lora_of(folder: Path, last_step: int) -> tuple[LoraFacts | None, bool]:
    """The facts of the latest LoRA, and whether it is the one of the run's end."""
    if (folder / FILE_NAME).is_file():
        facts = read_metadata(folder / FILE_NAME)[1]
        if facts is not None and facts.step >= last_step:
            return facts, True
    for _, checkpoint in sorted(_numbered(folder, "checkpoint"), reverse=True):
        if (checkpoint / FILE_NAME).is_file():
            return read_metadata(checkpoint / FILE_NAME)[1], False
    return None, False


def read_videos(folder: Path) -> list[ValidationVideo]:
    """The validation videos of a run, by step, then by name."""
    found = []
    for step, made in sorted(_numbered(folder / "validation", "step")):
        names = {path.stem for path in made.iterdir() if path.suffix in (".mp4", ".json") and path.name[0] != "."}
        for name in sorted(names):
            path = made / f"{name}.mp4"
            recipe = _json_object(made / f"{name}.json") or {}
            prompt, seed = recipe.get("prompt"), recipe.get("seed")
            width, height = recipe.get("width"), recipe.get("height")
            found.append(
                ValidationVideo(
                    step=step,
                    name=name,
                    path=path,
                    prompt=prompt if isinstance(prompt, str) else None,
                    seed=seed if isinstance(seed, int) else None,
                    size_bytes=path.stat().st_size if path.is_file() else None,
                    row=row_digest(recipe),
                    size=(width, height) if type(width) is int and type(height) is int else None,
                )
            )
    return found


def row_digest(recipe: dict[str, Any]) -> str:
    """What tells a row of validation from the others, in 8 hex digits, of a recipe as far as it says."""
    image = recipe.get("image")
    asked = [recipe.get(name) for name in ASKED]
    return digest_of([*asked, image.get("sha256") if isinstance(image, dict) else None], 4).hex()


def read_recipe(video: ValidationVideo) -> dict[str, Any]:
    """What the JSON beside a video says; empty where there is none."""
    return _json_object(video.path.with_suffix(".json")) or {}


def _numbered(folder: Path, kind: str) -> list[tuple[int, Path]]:
    """The folders `<kind>-<number>` in a folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    matched = [(re.fullmatch(rf"{kind}-(\d+)", path.name), path) for path in paths if path.is_dir()]
    return [(int(match[1]), path) for match, path in matched if match]


def _json_object(path: Path) -> dict[str, Any] | None:
    """The object that a file holds; None where there is no such file, or it holds something else."""
    try:
        value = json.loads(path.read_bytes())
        canonical_json(value)  # refuses what Python reads beyond JSON: NaN, half a pair of surrogates
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
