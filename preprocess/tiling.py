"""Whether the VAE encodes in tiles, and in which: decided once a run, before anything is looked for in the cache.

Tiles change the numbers, so their geometry is part of the fingerprint: `{height, width, overlap_height,
overlap_width}`, in pixels and as fractions of a tile; None: untiled.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.config import PreprocessConfig
from preprocess.fingerprints import tile_geometry
from shared.cache import Cache
from shared.config import to_dict
from shared.dataset import open_dataset
from shared.errors import UserError
from shared.geometry import SPATIAL_COMPRESSION, Bucket
from shared.models import Checkpoint, choose_device

Tiling = dict[str, Any] | None

# The encoder's peak beside its weights, on a CPU, counted in frames of its first width at full size: at most 7 for each
# frame that it takes at once and the two that its causal convolutions put before these; 45 for what these convolutions
# keep from one chunk to the next, old and new; and what the widest ones take for their weights in a layout of their
# own. Measured: docs/preprocess.md.
PEAK_FRAMES, KEPT_FRAMES, FIXED_BYTES = 7, 45, 100_000_000
CHUNK_FRAMES = 8  # that the VAE takes at once; what is left over goes to the first chunk
PADDED_FRAMES = 2
USABLE = 0.75  # of the memory that is free when the run starts: decoding children, frames that wait, other programs
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Of stage 1's configuration, what the choice depends on.
CHOSEN_BY = ("tile", "buckets", "height", "width", "max_num_frames", "vae_batch_size", "enable_slicing")


def choose_tiling(
    cache: Cache, checkpoint: Checkpoint, config: PreprocessConfig, dtype: str, untiled: dict[str, Any]
) -> Tiling:
    """The tiles of a run, as `--tile` and `--enable_tiling` say.

    `auto` takes the largest that fit, untiled first; and what the data set's current version took, when that was made
    with the same settings: memory that is a little fuller today must not encode everything again.

    Args:
        dtype: that the VAE runs in.
        untiled: the fingerprint of untiled moments.
    """
    default = tile_geometry(checkpoint)
    mode = config.tile or ("on" if config.enable_tiling else "off")
    if mode != "auto":
        return default if mode == "on" else None
    earlier = _earlier_choice(cache, config, untiled, default)
    if earlier:
        return earlier[0]
    buckets, _ = config.shapes(checkpoint.facts)  # shorter clips take no more
    choices: list[Tiling] = [None, *tile_choices(buckets, default)]
    fits = _probe(checkpoint, config, dtype, buckets) if choose_device() == "cuda" else _estimate(
        checkpoint, config, dtype, buckets
    )  # fmt: skip
    return next((tiling for tiling in choices if fits(tiling)), default)


def _earlier_choice(
    cache: Cache, config: PreprocessConfig, untiled: dict[str, Any], default: dict[str, Any]
) -> list[Tiling]:
    """What the data set's current version took, if it was made with the same settings; else nothing."""
    try:
        info = open_dataset(cache, config.dataset).info
    except UserError:  # there is none yet, or it is damaged: then it is made again
        return []
    told, facts = info.get("config"), info.get("facts")
    latents = facts.get("latents") if isinstance(facts, dict) else None
    if not isinstance(told, dict) or not isinstance(latents, dict):
        return []
    asked, tiling = to_dict(config), latents.get("tiling")
    same = all(told.get(name) == asked[name] for name in CHOSEN_BY)
    same = same and all(latents.get(name) == value for name, value in untiled.items() if name != "tiling")
    same = same and (tiling is None or (isinstance(tiling, dict) and tiling.keys() == default.keys()))
    return [tiling] if same else []


def tile_choices(buckets: list[Bucket], default: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Tiles from the largest to the VAE's own: for ever more rows and columns."""
    tallest, widest = max(bucket.height for bucket in buckets), max(bucket.width for bucket in buckets)
    heights = _sides(tallest, default["height"], default["overlap_height"])
    widths = _sides(widest, default["width"], default["overlap_width"])
    pairs = [(height, width) for height in heights for width in widths if height < tallest or width < widest]
    pairs.sort(key=lambda pair: min(pair[0], tallest) * min(pair[1], widest), reverse=True)
    for height, width in pairs:
        yield {**default, "height": height, "width": width}
    yield default


def _sides(whole: int, least: int, overlap: float) -> list[int]:
    """Sides of a tile, in pixels, descending: for each number of tiles the smallest that covers `whole`."""
    sides: list[int] = []
    for count in range(1, whole // SPATIAL_COMPRESSION + 1):
        side = -(-whole // count // SPATIAL_COMPRESSION) * SPATIAL_COMPRESSION
        while _stride(side, overlap) * count < whole or not _is_exact(side, overlap):
            side += SPATIAL_COMPRESSION
        if side <= least and sides:
            break
        sides.append(max(side, least))
    return sides


def _stride(side: int, overlap: float) -> int:
    return int(side * (1 - overlap))


def _is_exact(side: int, overlap: float) -> bool:
    """Whether tiles lie as far apart in pixels as diffusers puts them in latents; else what it makes is distorted."""
    latents = side // SPATIAL_COMPRESSION
    return _stride(side, overlap) == (latents - int(latents * overlap)) * SPATIAL_COMPRESSION


def peak_bytes(width: int, bucket: Bucket, batch: int, itemsize: int, tiling: Tiling) -> int:
    """A bound of what encoding a batch takes beside the weights, on a CPU.

    Args:
        width: channels of the VAE's first block.
        itemsize: of the VAE's dtype.
    """
    height, full_width = bucket.height, bucket.width
    if tiling:
        height, full_width = min(tiling["height"], height), min(tiling["width"], full_width)
    first = bucket.frames if bucket.frames < CHUNK_FRAMES else CHUNK_FRAMES + bucket.frames % CHUNK_FRAMES
    frames = PEAK_FRAMES * (first + PADDED_FRAMES)
    if bucket.frames > first:
        frames = max(frames, PEAK_FRAMES * (CHUNK_FRAMES + PADDED_FRAMES) + KEPT_FRAMES)
    arrays = frames * width * height * full_width * itemsize
    pixels = 3 * bucket.frames * bucket.height * bucket.width * (1 + 4 + 4 + itemsize)  # uint8, scaled, cast
    return batch * (arrays + pixels) + FIXED_BYTES


def available_bytes() -> int:
    """Memory that programs could still take on this machine, or in this container."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.exists():
        facts = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        found.append(int(facts["MemAvailable"].split()[0]) * 1024)
    limit, used = group / "memory.max", group / "memory.current"
    if limit.exists() and used.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        found.append(max(int(text) - int(used.read_text(encoding="ascii")), 0))
    return min(found)


def _estimate(
    checkpoint: Checkpoint, config: PreprocessConfig, dtype: str, buckets: list[Bucket]
) -> Callable[[Tiling], bool]:
    """Whether tiles fit into this machine's memory, by arithmetic: a CPU swaps or kills where a GPU says no."""
    stored, size_bytes = ITEM_BYTES[checkpoint.stored_dtype("vae")], ITEM_BYTES[dtype]
    weights = sum(path.stat().st_size for path in checkpoint.weight_files("vae")) * size_bytes // stored
    itemsize = ITEM_BYTES["float32"]  # whatever the dtype: what a CPU takes for bfloat16 has not been measured
    budget = int(USABLE * available_bytes()) - weights
    width, batch = checkpoint.config("vae")["block_out_channels"][0], _batch(config)
    return lambda tiling: max(peak_bytes(width, bucket, batch, itemsize, tiling) for bucket in buckets) <= budget


def _probe(
    checkpoint: Checkpoint, config: PreprocessConfig, dtype: str, buckets: list[Bucket]
) -> Callable[[Tiling], bool]:
    """Whether tiles fit into the GPU's memory: the largest clips are encoded.

    Not yet run on a GPU: the tests run its flow on a CPU.
    """
    import torch  # late: on a CPU, a run that misses nothing imports none

    from preprocess.encode import VideoEncoder

    def fits(tiling: Tiling) -> bool:
        encoder = VideoEncoder(checkpoint, dtype, "float16", slicing=config.enable_slicing, tiling=tiling)
        try:
            for bucket in buckets:
                shape = (config.vae_batch_size, bucket.frames, bucket.height, bucket.width, 3)
                encoder.encode(np.zeros(shape, np.uint8))
        except torch.cuda.OutOfMemoryError:
            return False
        finally:
            del encoder
            gc.collect()
            torch.cuda.empty_cache()
        return True

    return fits


def _batch(config: PreprocessConfig) -> int:
    return 1 if config.enable_slicing else config.vae_batch_size
