"""What stages 1 and 2 are both told of validation videos: rows of a file, or prompts and pictures in a flag each.

--validation_prompts rows.jsonl       a row a video; or .csv, or .txt (shared/prompt_file.py)
--validation_prompt "a:::b"           the guide's, with --validation_prompt_separator
--validation_images "a.png:::b.png"   one for all prompts, or one for each
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from shared.errors import ConfigError
from shared.geometry import Bucket
from shared.models import Facts
from shared.prompt_file import PromptRow, read_prompts
from shared.sizes import check_bucket

FILE_FLAG, PROMPT_FLAG, IMAGES_FLAG = "--validation_prompts", "--validation_prompt", "--validation_images"


def check_validation_flags(prompt: str | None, file: str | None, separator: str) -> None:
    """Refuse flags that contradict each other, before any file is read.

    Raises:
        ConfigError: as said.
    """
    if not separator:
        raise ConfigError("--validation_prompt_separator is empty; give what stands between prompts, such as :::")
    if prompt is not None and not _split(prompt, separator):
        raise ConfigError(
            f"--validation_prompt {prompt!r}: holds no prompt; give one, such as 'a cat', or leave it out"
        )
    if prompt is not None and file is not None:
        raise ConfigError(f"--validation_prompts {file}: stands in place of --validation_prompt; give one of them")


def rows_of_flags(prompt: str | None, file: str | None, separator: str) -> list[PromptRow] | None:
    """The rows that the flags ask for; None: neither is given.

    Raises:
        ConfigError: of the file, as `read_prompts`.
    """
    if file is not None:
        return read_prompts(file, FILE_FLAG)
    if prompt is None:
        return None
    return [PromptRow(text, origin=PROMPT_FLAG) for text in _split(prompt, separator)]


def with_images(rows: list[PromptRow], images: str | None, separator: str) -> list[PromptRow]:
    """The rows with the pictures of `--validation_images`: one for all of them, or one for each, in order.

    Raises:
        ConfigError: they are neither one nor as many as the rows; or a row of a file names its own.
    """
    if images is None:
        return rows
    named = next((row for row in rows if row.image is not None and row.origin != PROMPT_FLAG), None)
    if named is not None:
        raise ConfigError(
            f"--validation_images {images}: {named.origin} names an image of its own; give one or the other"
        )
    paths = [str(Path(text).expanduser().resolve()) for text in _split(images, separator)]
    if len(paths) not in (1, len(rows)) or not rows:
        raise ConfigError(
            f"--validation_images: {len(paths)} pictures for {len(rows)} prompts; give one for all, or one for each"
        )
    paths = paths * len(rows) if len(paths) == 1 else paths
    return [replace(row, image=path) for row, path in zip(rows, paths, strict=True)]


def check_row(row: PromptRow, shape: Bucket, facts: Facts, name: str, *, drop_learned_positions: bool) -> None:
    """Refuse a row that the checkpoint cannot make a video of.

    Args:
        shape: of a video whose row does not say.
        name: of the checkpoint, for the message.

    Raises:
        ConfigError: its size, or a picture that the checkpoint does not start from.
    """
    if row.image is not None and not facts.image_to_video:
        refuse_images(told_image(row), facts)
    try:
        bucket = Bucket(row.num_frames or shape.frames, row.height or shape.height, row.width or shape.width)
        check_bucket(bucket, facts, name, drop_learned_positions=drop_learned_positions)
    except ConfigError as error:
        raise ConfigError(f"{told(row)}: {error}") from error


def refuse_images(what: str, facts: Facts) -> NoReturn:
    """Raise the ConfigError of a picture that is for no image-to-video checkpoint."""
    raise ConfigError(f"{what}: the checkpoint is {facts.kind}, whose videos start from none; leave it out")


def told(row: PromptRow) -> str:
    """How a message about a row opens: where it stands, and its prompt."""
    return f"{row.origin} {row.prompt!r:.80}"


def told_image(row: PromptRow) -> str:
    """How a message about a row's picture opens."""
    return f"{IMAGES_FLAG if row.origin == PROMPT_FLAG else f'{row.origin}: image'} {row.image}"


def _split(text: str, separator: str) -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]
