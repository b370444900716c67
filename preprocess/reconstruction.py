"""What the VAE makes of cached moments, beside the frames that were encoded, and how far it is from them (PSNR).

The frames are read again, and only where the latent's key proves that they are those: it is the digest of the source's
bytes, the frames taken and their placement.

Shapes: F frames, C latent channels, T latent frames, H and W height and width.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from preprocess.decode import DecodePool, make_preview
from preprocess.frames import Placement
from preprocess.sources import Source, known_sources
from shared.cache import Store, latent_key
from shared.dataset import DataSet
from shared.errors import CacheError, VideoError
from shared.models import Checkpoint, choose_device, load_vae, open_checkpoint
from shared.shards import Location, decode_array, read_index, read_member

TIMEOUT_S = 120.0  # of decoding one clip


def reconstruct(
    dataset: DataSet, rows: Sequence[dict[str, Any]], count: int, model: str | None, cache_dir: str | None
) -> dict[str, dict[str, Any]]:
    """Reconstructions of `count` samples, spread evenly over `rows`, in the tiles that they were encoded in.

    Args:
        model: the checkpoint; None: what dataset.json names.

    Returns:
        By sample_id: `jpeg`, a strip of its frames; `psnr`, in dB; `fault`, why one of these is None; `tiled`, whether
        it was decoded in tiles because the GPU has no room for the whole.

    Raises:
        CacheError: the latents are of another VAE, or no sample could be compared.
        ModelError: there is no such checkpoint.
    """
    import torch

    chosen = [rows[place] for place in sorted({round(p) for p in np.linspace(0, len(rows) - 1, min(count, len(rows)))})]
    facts, told = dataset.info["facts"]["latents"], dataset.info["model"]
    own = model is None
    checkpoint = open_checkpoint(
        told["name"] if own or model is None else model,
        revision=told["revision"] if own else None,
        variant=told["variant"] if own else None,
        cache_dir=cache_dir,
        weights=("vae",),
    )
    _check_vae(checkpoint, facts)
    store = dataset.open_store("latent")
    found: dict[str, dict[str, Any]] = {}
    made: dict[str, dict[str, Any]] = {}
    for row in chosen:
        try:
            found[row["sample_id"]] = _key_facts(store, row["latent_key"])
        except CacheError as error:
            made[row["sample_id"]] = {"jpeg": None, "psnr": None, "fault": str(error), "tiled": False}
    chosen = [row for row in chosen if row["sample_id"] in found]
    sources = _find_sources(dataset, chosen, found)
    vae = load_vae(checkpoint, getattr(torch, facts["dtype"])).to(choose_device())
    if tiling := facts["tiling"]:
        vae.enable_tiling(tiling["height"], tiling["width"], tiling["overlap_height"], tiling["overlap_width"])
    with DecodePool(1, TIMEOUT_S) as pool:
        for row in chosen:
            name, source = row["sample_id"], sources.get(row["sample_id"])
            moments = decode_array(store.read(row["latent_key"]), f"sample {name}")
            try:
                frames = decode_moments(vae, moments)
            except torch.OutOfMemoryError:  # whole, decoding a clip takes more than twice what encoding it took
                if vae.use_tiling:
                    raise
                vae.enable_tiling()
                frames = decode_moments(vae, moments)
            fault, psnr = "", None
            if source is None:
                fault = "its video is not where stage 1 read it, or has changed"
            else:
                placement = Placement(**found[name]["placement"])
                read = pool.read(source.path, source.require_probe(), row["frame_indices"], placement, preview=False)
                try:
                    psnr = peak_signal_to_noise(read.result().frames, frames)
                except VideoError as error:
                    fault = str(error)
            tiled = vae.use_tiling and not facts["tiling"]
            made[name] = {"jpeg": make_preview(frames), "psnr": psnr, "fault": fault, "tiled": tiled}
    if made and all(one["psnr"] is None for one in made.values()):
        faults = "; ".join(sorted({one["fault"] for one in made.values()}))
        raise CacheError(f"{dataset.cache.url}: no sample could be compared ({faults}); bring the videos back")
    return made


def decode_moments(vae: Any, moments: np.ndarray) -> np.ndarray:
    """Frames uint8 [F, H, W, 3] that the VAE makes of the mean of moments [2C, T, H, W]."""
    import torch

    mean = torch.from_numpy(moments[: len(moments) // 2].astype(np.float32))[None]
    with torch.no_grad():
        pixels = vae.decode(mean.to(vae.device, vae.dtype)).sample[0]
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def peak_signal_to_noise(frames: np.ndarray, other: np.ndarray) -> float:
    """PSNR in dB between uint8 frames [F, H, W, 3]; infinite where they are equal."""
    error = float(np.mean((frames.astype(np.float64) - other) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def _check_vae(checkpoint: Checkpoint, facts: dict[str, Any]) -> None:
    vae = {"weights": checkpoint.weights_digest("vae"), "config": checkpoint.encoding_config()}
    if vae != facts["vae"]:
        raise CacheError(
            f"{checkpoint.name}: its VAE is not the one that encoded the data set; give "
            "--pretrained_model_name_or_path the checkpoint that stage 1 was given"
        )


def _key_facts(store: Store, key: bytes) -> dict[str, Any]:
    """The JSON beside a sample's moments, wherever a repair has put them: placement and pixels_version."""
    (row,) = store.find([key])
    if row < 0:
        raise CacheError(f"{store.storage.full(store.folder)}: does not hold {key.hex()}; run stage 1 again")
    part = store.location(int(row)).part
    path = f"{store.folder}/{part}.parquet"
    try:
        table, _ = read_index(store.storage.read(path), store.storage.full(path))
    except OSError as error:
        raise CacheError(f"{store.storage.full(path)}: cannot be read ({error}); run stage 1 again") from error
    for entry in table.to_pylist():
        if entry["key"] == key and entry["member"] == "json":
            place = Location(part, entry["offset"], entry["size_bytes"], entry["crc32"])
            return dict(json.loads(read_member(store.storage, store.folder, place)))
    raise CacheError(f"{store.storage.full(path)}: has no facts of {key.hex()}; run stage 1 again")


def _find_sources(
    dataset: DataSet, rows: Sequence[dict[str, Any]], facts: dict[str, dict[str, Any]]
) -> dict[str, Source]:
    """By sample_id the video that it was encoded from, where it still is as it was."""
    named: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        named.setdefault(row["source"].rpartition("/")[2], []).append(row)
    found = {}
    for source in known_sources(dataset.cache.storage):
        for row in named.get(source.path.rpartition("/")[2], ()):
            told = facts[row["sample_id"]]
            key = latent_key(source.digest, row["frame_indices"], told["placement"], told["pixels_version"])
            if key == row["latent_key"] and source.is_unchanged():
                found[row["sample_id"]] = source
    return found
