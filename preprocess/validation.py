"""What stage 1 leaves for validation videos: their rows in dataset.json, their prompts encoded, their pictures.

row of --validation_prompts -> entry: the row's columns, where its embedding lies, `pictures/<sha256>.<format>`
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from preprocess.config import PreprocessConfig
from shared.cache import Cache, Store, embedding_key
from shared.dataset import location_row
from shared.pictures import FOLDER, open_picture, picture_name
from shared.prompt_file import PromptRow, row_values
from shared.prompts import user_prompt
from shared.validation import told_image


def check_pictures(rows: list[PromptRow]) -> None:
    """Refuse pictures that cannot be read, before anything is downloaded, loaded or encoded.

    Raises:
        ConfigError: names the first of them.
    """
    for path, row in {row.image: row for row in reversed(rows) if row.image is not None}.items():
        open_picture(Path(path), told_image(row))


def alone_prompts(config: PreprocessConfig) -> frozenset[str]:
    """The effective prompts that are encoded by themselves, as stage 3 does, so that both have the same bits."""
    return frozenset(["", *(user_prompt(row.prompt, config.id_token) for row in config.validation_rows)])


def publish_pictures(cache: Cache, writer: Path, rows: list[PromptRow]) -> dict[str, str]:
    """Put the rows' pictures into the cache. Returns where each lies in it, by the path that the row names.

    Args:
        writer: the writer's folder: what is published is a copy there, which nobody changes meanwhile.

    Raises:
        ConfigError: one is gone, or no picture any more.
    """
    places: dict[str, str] = {}
    for row in rows:
        if row.image is None or row.image in places:
            continue
        open_picture(Path(row.image), told_image(row))
        copy = writer / "picture"
        shutil.copyfile(row.image, copy)
        with copy.open("rb") as file:
            os.fsync(file.fileno())
        place = f"{FOLDER}/{picture_name(copy, told_image(row))}"
        if not cache.storage.exists(place) or cache.storage.size(place) != copy.stat().st_size:
            cache.storage.publish(copy, place)
        places[row.image] = place
    return places


def prompt_entries(config: PreprocessConfig, embeddings: Store, places: dict[str, str]) -> dict[str, Any]:
    """What dataset.json says of the prompts that are no clip's.

    Args:
        places: of `publish_pictures`.
    """
    return {
        "empty_prompt": _prompt_entry(embeddings, "", ""),
        "validation_prompts": [
            {
                **_prompt_entry(embeddings, row.prompt, user_prompt(row.prompt, config.id_token)),
                **{name: value for name, value in row_values(row).items() if name != "prompt"},
                **({"image": places[row.image]} if row.image is not None else {}),
            }
            for row in config.validation_rows
        ],
    }


def _prompt_entry(store: Store, prompt: str, effective: str) -> dict[str, Any]:
    key = embedding_key(effective)
    row = int(store.find([key])[0])
    place = location_row("embedding", store.location(row))
    return {"prompt": prompt, "effective_prompt": effective, "embedding_key": key.hex(), **place}
