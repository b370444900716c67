"""Pictures that validation videos start from: files of the cache, each under the digest of its bytes.

CACHE/pictures/<sha256>.<format>      as the user gave it, to the last byte: png, jpeg, webp, ...
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import CacheError, ConfigError
from shared.storage import Storage

if TYPE_CHECKING:
    from PIL.Image import Image

FOLDER = "pictures"
_NAME = re.compile(r"[0-9a-f]{64}\.[a-z0-9]{1,12}")


def open_picture(file: Path, what: str) -> Image:
    """The picture in RGB, turned as its EXIF data say, as a viewer shows it.

    Args:
        what: flag or row that names it, and the file, for the message.

    Raises:
        ConfigError: there is no such file, or it is no picture.
    """
    return _open(file, what)[0]


def picture_name(file: Path, what: str) -> str:
    """The name of a picture in a cache: the sha256 of its bytes and its format, whatever the file is called.

    Raises:
        ConfigError: as `open_picture`.
    """
    suffix = _open(file, what)[1]
    with file.open("rb") as opened:
        return f"{hashlib.file_digest(opened, 'sha256').hexdigest()}.{suffix}"


def _open(file: Path, what: str) -> tuple[Image, str]:
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            suffix = re.sub(r"[^a-z0-9]", "", str(image.format).lower())
            return ImageOps.exif_transpose(image).convert("RGB"), suffix
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise ConfigError(f"{what}: cannot be read as a picture ({error}); give a PNG or JPEG file") from error


def is_picture_name(name: object) -> bool:
    """Whether a file in the folder has a picture's name."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def is_picture_path(path: object) -> bool:
    """Whether a path, relative to the cache, is a picture's."""
    return isinstance(path, str) and path.startswith(f"{FOLDER}/") and is_picture_name(path.removeprefix(f"{FOLDER}/"))


def digest_in(name: str) -> bytes:
    """The digest that a picture's name or path holds."""
    return bytes.fromhex(name.rpartition("/")[2].partition(".")[0])


def read_picture(storage: Storage, path: str) -> bytes:
    """The bytes of a picture of a cache, as they were put there.

    Raises:
        CacheError: it is gone, or its bytes have changed.
    """
    try:
        data = storage.read(path)
    except FileNotFoundError as error:
        raise CacheError(f"{storage.full(path)}: is missing; run stage 1 again") from error
    if hashlib.sha256(data).digest() != digest_in(path):
        raise CacheError(
            f"{storage.full(path)}: its bytes have changed since they were written (sha256); run "
            f"`python -m preprocess.verify {storage.url} --repair`, then stage 1 again"
        )
    return data
