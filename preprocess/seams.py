"""What tiles change: the same clips encoded in tiles and in one piece, compared at the seams and elsewhere.

Shapes: C latent channels, T latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.decode import DecodePool
from preprocess.plan import Sample
from shared.errors import VideoError
from shared.geometry import SPATIAL_COMPRESSION

if TYPE_CHECKING:
    from preprocess.encode import VideoEncoder

CHECKED_CLIPS = 4  # at most; spread over the manifest


@dataclass(frozen=True)
class Difference:
    """How far tiled latents are from untiled ones, in the untiled ones' standard deviation; 0 where there are none."""

    rms: float
    largest: float

    def __str__(self) -> str:
        return f"rms {self.rms:.2%}, max {self.largest:.2%}"


@dataclass(frozen=True)
class Seams:
    """The differences of a clip: everywhere, where tiles are blended, and where they are not.

    Attributes:
        share: of the latents that lie at seams.
    """

    overall: Difference
    at_seams: Difference
    elsewhere: Difference
    share: float

    def __str__(self) -> str:
        if not self.share:
            return f"{self.overall}; one tile, no seams"
        return f"{self.overall}; at seams ({self.share:.0%}) {self.at_seams}; elsewhere {self.elsewhere}"


def seam_lines(
    encoder: VideoEncoder, pool: DecodePool, samples: Sequence[Sample], tiling: dict[str, Any]
) -> Iterator[str]:
    """What tiles change in a few of the samples, a line each."""
    step = -(-len(samples) // CHECKED_CLIPS)
    for sample in samples[::step]:
        arguments = (sample.record.path, sample.probe, sample.frame_indices, sample.placement)
        try:
            clip = pool.read(*arguments, preview=False).result()
        except VideoError as error:
            yield f"seams     {sample.record.source}: not read: {error}"
        else:
            yield f"seams     {sample.record.source} {sample.bucket}: {compare(encoder, clip.frames, tiling)}"


def compare(encoder: VideoEncoder, frames: np.ndarray, tiling: dict[str, Any]) -> Seams:
    """Encode uint8 RGB frames [F, H, W, 3] both ways and compare the means of the posteriors."""
    means = []
    for tiles in (None, tiling):
        encoder.set_tiling(tiles)
        moments = encoder.encode(frames[None])[0].astype(np.float32)
        means.append(moments[: len(moments) // 2])
    untiled, tiled = means
    relative = np.abs(tiled - untiled) / max(float(untiled.std()), 1e-12)
    mask = seam_mask(untiled.shape[2], untiled.shape[3], tiling)
    return Seams(
        overall=_difference(relative),
        at_seams=_difference(relative[..., mask]),
        elsewhere=_difference(relative[..., ~mask]),
        share=float(mask.mean()),
    )


def seam_mask(height: int, width: int, tiling: dict[str, Any]) -> np.ndarray:
    """Which latents [H, W] diffusers blends of two tiles: the first rows and columns of each tile but the first."""
    if height * SPATIAL_COMPRESSION <= tiling["height"] and width * SPATIAL_COMPRESSION <= tiling["width"]:
        return np.zeros((height, width), bool)
    rows = _blended(height, tiling["height"], tiling["overlap_height"])
    columns = _blended(width, tiling["width"], tiling["overlap_width"])
    return rows[:, None] | columns[None, :]


def _blended(length: int, tile: int, overlap: float) -> np.ndarray:
    latents = tile // SPATIAL_COMPRESSION
    extent = int(latents * overlap)
    step = latents - extent
    places = np.arange(length)
    return (places >= step) & (places % step < extent)


def _difference(relative: np.ndarray) -> Difference:
    if not relative.size:
        return Difference(0.0, 0.0)
    return Difference(float(np.sqrt(np.mean(np.square(relative, dtype=np.float64)))), float(relative.max()))
