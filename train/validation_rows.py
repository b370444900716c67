"""Which videos validation makes: the rows that flags or a file choose, else those that the data set was made with.

    OUTPUT/validation/prompts.jsonl              the rows, as `python -m infer --prompts` takes them
    OUTPUT/validation/images/<sha256>.<format>   the pictures that they start from, whatever they came from

All of it is chosen, checked and on this machine before the first step. A run's folder then needs nothing but the cache,
which holds the prompts' embeddings: its videos can be made from another folder, or on another machine.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shared.cache import Cache
from shared.dataset import DataSet
from shared.errors import CacheError, ConfigError
from shared.geometry import Bucket
from shared.lora import LoraFacts
from shared.models import Checkpoint, Facts
from shared.pictures import FOLDER as PICTURES
from shared.pictures import is_picture_path, open_picture, picture_name, read_picture
from shared.prompt_file import COLUMNS, PromptRow, make_row, prompt_lines, read_prompts
from shared.prompts import user_prompt
from shared.storage import write_atomically
from shared.validation import (
    FILE_FLAG,
    IMAGES_FLAG,
    PROMPT_FLAG,
    check_row,
    refuse_images,
    rows_of_flags,
    told,
    told_image,
    with_images,
)
from train.config import TrainConfig

FOLDER = "validation"
FILE = "prompts.jsonl"
MOST_SEED = 2**63 - 1


def choose_rows(
    config: TrainConfig, dataset: DataSet, base: Checkpoint, lora: LoraFacts, *, makes_videos: bool
) -> list[PromptRow]:
    """The rows of validation videos; an image is a path of this machine, or the full path of one in the cache.

    Args:
        lora: whose id token the prompts get, and whose size a video has whose row does not say.
        makes_videos: image-to-video rows must have their pictures.

    Raises:
        ConfigError: a prompt whose embedding the cache does not hold, naming the command that adds it; or whatever of
            a row cannot be made.
    """
    rows = _asked(config, dataset, base.facts, lora.id_token)
    if makes_videos and not rows:
        raise ConfigError(
            f"data set {dataset.name}: has no validation prompts; run `python -m preprocess` again, with the same "
            "flags and --validation_prompt, or make no validation videos"
        )
    check_rows(config, rows, dataset, base, lora, makes_videos=makes_videos)
    return rows


def check_rows(
    config: TrainConfig,
    rows: list[PromptRow],
    dataset: DataSet,
    base: Checkpoint,
    lora: LoraFacts,
    *,
    makes_videos: bool,
) -> None:
    """Refuse rows that stage 3 could not make, as `choose_rows` does."""
    known = {entry["effective_prompt"] for entry in dataset.info["validation_prompts"]}
    shape = Bucket(lora.frames, lora.height, lora.width)
    for row in rows:
        if user_prompt(row.prompt, lora.id_token) not in known:
            flag = PROMPT_FLAG if row.origin == PROMPT_FLAG else FILE_FLAG
            raise ConfigError(
                f"{told(row)}: its embedding is not in data set {dataset.name}; run `python -m preprocess` again, with "
                f"the same flags and this {flag}: it encodes nothing else"
            )
        check_row(row, shape, base.facts, base.name, drop_learned_positions=lora.drop_learned_positions)
        last = _seed(config, row) + config.num_validation_videos - 1
        if not 0 <= _seed(config, row) <= last <= MOST_SEED:
            raise ConfigError(f"{told(row)}: its seeds are {_seed(config, row)} to {last}; must be 0 to 2^63 - 1")
        if row.image is not None:
            _check_picture(row, dataset.cache)
        elif base.facts.image_to_video and makes_videos:
            raise ConfigError(
                f"--validation_images is missing: the checkpoint is {base.facts.kind}; give the pictures that "
                f"validation videos start from, here or to stage 1 ({told(row)} has none)"
            )


def _asked(config: TrainConfig, dataset: DataSet, facts: Facts, id_token: str | None) -> list[PromptRow]:
    images, separator = config.validation_images, config.validation_prompt_separator
    if images is not None and not facts.image_to_video:
        refuse_images(f"{IMAGES_FLAG} {images}", facts)
    held = list(_held(dataset, facts, id_token))
    asked = rows_of_flags(config.validation_prompt, config.validation_prompts, separator)
    if asked is None:
        rows = held if images is None else [replace(row, image=None, origin=PROMPT_FLAG) for row in held]
        return with_images(rows, images, separator)
    asked = with_images(asked, images, separator)
    if config.validation_prompts is not None:  # a file says all of its rows, but for pictures that only the cache has
        return [row if row.image or not facts.image_to_video else _with_picture(row, held) for row in asked]
    return [
        replace(found, image=row.image or found.image, origin=row.origin if row.image else found.origin)
        for row in asked
        for found in [one for one in held if one.prompt == row.prompt] or [row]
    ]


def _with_picture(row: PromptRow, held: list[PromptRow]) -> PromptRow:
    images = [one.image for one in held if one.prompt == row.prompt and one.image is not None]
    return replace(row, image=images[0]) if images else row


def _held(dataset: DataSet, facts: Facts, id_token: str | None) -> Iterator[PromptRow]:
    """The rows that the data set was made with; their pictures where the checkpoint, perhaps another, takes any."""
    storage = dataset.cache.storage
    for entry in dataset.info["validation_prompts"]:
        image = entry.get("image")
        if image is not None and not is_picture_path(image):
            path = storage.full(f"{dataset.folder}/dataset.json")
            raise CacheError(f"{path}: {image!r:.80} is no picture of a cache; run stage 1 again")
        values = {name: entry[name] for name in COLUMNS if name != "image" and entry.get(name) is not None}
        row = make_row(values, f"data set {dataset.name}", Path())
        if user_prompt(row.prompt, id_token) != entry["effective_prompt"]:  # data sets of several tokens: the LoRA
            row = replace(row, prompt=entry["effective_prompt"])  # has none, and a prompt says its own
        yield row if image is None or not facts.image_to_video else replace(row, image=storage.full(image))


def _seed(config: TrainConfig, row: PromptRow) -> int:
    return config.seed if row.seed is None else row.seed


def _place(image: str, cache: Cache) -> str | None:
    """Where in the cache a picture lies; None: it is a file of the user's."""
    place = image.removeprefix(f"{cache.url}/")
    return place if place != image and is_picture_path(place) else None


def _check_picture(row: PromptRow, cache: Cache) -> None:
    assert row.image is not None
    place = _place(row.image, cache)
    if place is None:
        open_picture(Path(row.image), told_image(row))
    elif not cache.storage.exists(place):
        raise ConfigError(f"{told(row)}: its picture {row.image} is gone from the cache; run stage 1 again")


def seeded(config: TrainConfig, rows: list[PromptRow]) -> list[PromptRow]:
    """The rows of a set, each of `--num_validation_videos` times with a seed of its own: the row's, the next, ..."""
    numbers = range(config.num_validation_videos)
    return [replace(row, seed=_seed(config, row) + number) for number in numbers for row in rows]


def store_rows(output_dir: Path, rows: list[PromptRow], cache: Cache) -> list[PromptRow]:
    """Write a run's rows and their pictures into its folder. Returns the rows, their images there, absolute.

    Raises:
        CacheError: a picture of the cache is gone or damaged.
        ConfigError: a file is gone, or no picture any more.
    """
    folder = (output_dir / FOLDER).resolve()
    with_pictures = any(row.image is not None for row in rows)
    (folder / "images" if with_pictures else folder).mkdir(parents=True, exist_ok=True)
    names = {row.image: _store(row, folder / "images", cache) for row in rows if row.image is not None}
    told_rows = [row if row.image is None else replace(row, image=f"images/{names[row.image]}") for row in rows]
    write_atomically(folder / FILE, prompt_lines(told_rows))
    return [row if row.image is None else replace(row, image=str(folder / row.image)) for row in told_rows]


def _store(row: PromptRow, images: Path, cache: Cache) -> str:
    assert row.image is not None
    place = _place(row.image, cache)
    if place is not None:
        name = place.removeprefix(f"{PICTURES}/")
        write_atomically(images / name, read_picture(cache.storage, place))
        return name
    name = picture_name(Path(row.image), told_image(row))
    if (images / name).resolve() != Path(row.image).resolve():
        copy = images / f".{name}.tmp"
        shutil.copyfile(row.image, copy)
        copy.replace(images / name)
    return name


def stored_rows(output_dir: Path) -> list[PromptRow] | None:
    """The rows that a run has written, their images absolute; None: it has written none."""
    path = output_dir / FOLDER / FILE
    return read_prompts(str(path), str(path)) if path.is_file() else None
