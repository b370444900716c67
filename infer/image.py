"""The image that an image-to-video checkpoint starts from: which file, and its pixels.

Shapes: H and W height and width in pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.digests import file_digest
from shared.pictures import open_picture

if TYPE_CHECKING:
    from PIL.Image import Image


def find_image(path: str) -> dict[str, Any]:
    """What a recipe says of an image: its `path`, absolute, and its `sha256`.

    Raises:
        ConfigError: there is no such file, or it is no picture.
    """
    file = Path(path).expanduser()
    open_image(file)
    return {"path": str(file.resolve()), "sha256": file_digest(file)}


def open_image(file: Path) -> Image:
    """The picture in RGB, turned as its EXIF data say, as a viewer shows it.

    Raises:
        ConfigError: there is no such file, or it is no picture.
    """
    return open_picture(file, f"--image {file}")


def fit_image(image: Image, height: int, width: int) -> Image:
    """The picture at H x W: the smallest resize that covers it, and its middle: what stage 1 makes of a frame."""
    import numpy as np
    import torch
    from PIL.Image import fromarray

    scale = max(height / image.height, width / image.width)
    size = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
    pixels = torch.from_numpy(np.array(image)[None]).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return fromarray(resized[0, :, top : top + height, left : left + width].permute(1, 2, 0).contiguous().numpy())
