"""Frames, sizes and buckets of a clip, in pixels and in latents. Arithmetic only.

CogVideoX's VAE compresses 8 x 8 pixels and 4 frames (the first frame stands alone), so that a clip of
4k + 1 frames gives k + 1 latent frames; its transformer joins 2 x 2 latents to a token, so that sides are
multiples of 16 pixels. `shared/models.py` checks that a model's configs say the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shared.errors import ConfigError

SPATIAL_COMPRESSION = 8  # pixels a latent, along each side
TEMPORAL_COMPRESSION = 4  # frames a latent frame, after the first
SIDE_MULTIPLE = 16  # SPATIAL_COMPRESSION x the transformer's patch_size


def largest_frame_count(frames: int) -> int:
    """The largest 4k + 1 that is at most `frames`; 0 when there is none."""
    return (frames - 1) // TEMPORAL_COMPRESSION * TEMPORAL_COMPRESSION + 1 if frames >= 1 else 0


def latent_frames(frames: int) -> int:
    """Latent frames of a clip of `frames` (4k + 1) frames."""
    return (frames - 1) // TEMPORAL_COMPRESSION + 1


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape that clips are brought to: frames (4k + 1), height and width in pixels (multiples of 16).

    Raises:
        ConfigError: a value that the VAE or the transformer cannot take; names the nearest ones.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames != largest_frame_count(self.frames):
            below = max(largest_frame_count(self.frames), 1)
            raise ConfigError(
                f"frame count {self.frames}: the VAE takes 4k + 1 frames; use {below} or {below + TEMPORAL_COMPRESSION}"
            )
        for name, side in (("height", self.height), ("width", self.width)):
            if side < SIDE_MULTIPLE or side % SIDE_MULTIPLE:
                below = max(side // SIDE_MULTIPLE, 1) * SIDE_MULTIPLE
                raise ConfigError(
                    f"{name} {side}: must be a multiple of {SIDE_MULTIPLE}; use {below} or {below + SIDE_MULTIPLE}"
                )

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """The bucket that `text` names, as in `49x480x720` (frames x height x width)."""
        match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})x([0-9]{1,9})", text.strip())
        if not match:
            raise ConfigError(f"bucket {text!r}: must be FRAMESxHEIGHTxWIDTH, such as 49x480x720")
        return cls(*(int(group) for group in match.groups()))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, height and width."""
        return latent_frames(self.frames), self.height // SPATIAL_COMPRESSION, self.width // SPATIAL_COMPRESSION
