"""What tiles change: the same clips encoded in tiles and in one piece, compared at the seams and elsewhere.

Shapes: C latent channels, T latent frames, H and W latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.config import PreprocessConfig
from preprocess.decode import DecodePool
from preprocess.fingerprints import tile_geometry
from preprocess.plan import Sample, refusal
from preprocess.prepare import open_model, open_stores, plan_clips, read_manifest
from preprocess.sources import Sources
from preprocess.spool import Spool
from shared.cache import Cache
from shared.errors import UserError, VideoError
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


def check_tiling(config: PreprocessConfig) -> Iterator[str]:
    """What tiles change, in a few of the clips: a line for the tiles, then one for each clip.

    The tiles are those that a run with this configuration would take; the VAE's own, where it would take none. The
    cache learns what there is to know of the videos, and nothing else is written.

    Raises:
        UserError: as `preprocess`.
    """
    with Spool() as spool:
        read_manifest(config, spool)
        checkpoint = open_model(config)
        cache = Cache(config.cache)
        stores = open_stores(cache, checkpoint, config)
        with cache.writer() as writer, DecodePool(1, config.decode_timeout) as pool:
            sources = Sources(cache, spool, writer)
            sources.learn(pool, retry=config.retry_rejected)
            sources.save()
            plan_clips(spool, config, checkpoint)
            samples, rejected = spool.counts()
            if not samples and not rejected:
                raise UserError(
                    f"--check_tiling: no clip is of --worker_index {config.worker_index} of {config.num_workers}; "
                    "leave --num_workers and --worker_index out"
                )
            if not samples:
                raise UserError(refusal(samples, rejected, next(spool.rejected())[1]))
            from preprocess.encode import VideoEncoder  # late: torch

            tiling = stores.tiling or tile_geometry(checkpoint)
            size = f"{tiling['height']}x{tiling['width']}"
            told = "as this run would take" if stores.tiling else "the VAE's own: this run would take none"
            yield f"tiles     {size} pixels, {told}; differences from untiled in the latents' standard deviation"
            encoder = VideoEncoder(checkpoint, stores.vae_dtype, "float32", slicing=False, tiling=None)
            checked = (sample for _, _, sample in spool.samples())
            yield from seam_lines(encoder, pool, islice(checked, 0, None, -(-samples // CHECKED_CLIPS)), tiling)


def seam_lines(
    encoder: VideoEncoder, pool: DecodePool, samples: Iterable[Sample], tiling: dict[str, Any]
) -> Iterator[str]:
    """What tiles change in samples, a line each."""
    for sample in samples:
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
