"""What stage 1 does before it encodes: the manifest read, the checkpoint and the stores opened, each record planned."""

from __future__ import annotations

import hashlib
from typing import Any

from preprocess.config import PreprocessConfig
from preprocess.fingerprints import embeddings_fingerprint, images_fingerprint, latents_fingerprint
from preprocess.plan import plan_record
from preprocess.publish import Stores
from preprocess.share import is_mine
from preprocess.spool import Spool
from preprocess.tiling import choose_tiling
from shared.cache import Cache
from shared.console import Progress
from shared.models import Checkpoint, choose_dtype, open_checkpoint
from shared.sizes import check_dtype
from shared.storage import canonical_json


def read_manifest(config: PreprocessConfig, spool: Spool) -> str:
    """Give the spool this worker's records. Returns the digest of all records, whosever they are."""
    hasher = hashlib.sha256()
    for row, record in enumerate(Progress(config.records(), name="manifest", unit="clip")):
        told = (record.source, record.caption, record.start_s, record.end_s, record.weight)
        hasher.update(canonical_json(told))
        if is_mine(config, record):
            spool.add_record(row, record)
    return hasher.hexdigest()


def open_model(config: PreprocessConfig) -> Checkpoint:
    """The checkpoint that encodes; a size that it cannot take is refused before anything else is opened."""
    checkpoint = open_checkpoint(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        weights=("vae", "text_encoder"),
    )
    config.check(checkpoint.facts)
    for part in ("vae", "text_encoder"):
        check_dtype(checkpoint, part, config.dtype, f"--dtype {config.dtype}", allowed=config.allow_dtype)
    return checkpoint


def open_stores(cache: Cache, checkpoint: Checkpoint, config: PreprocessConfig) -> Stores:
    """The stores that the run reads and fills; the tiles of `--tile auto` are chosen on the way."""
    vae_dtype = choose_dtype(config.dtype, checkpoint.stored_dtype("vae"))
    text_dtype = choose_dtype(config.dtype, checkpoint.stored_dtype("text_encoder"))
    common: dict[str, Any] = {"cache_dtype": config.cache_dtype, "rehash": config.rehash}
    untiled = latents_fingerprint(checkpoint, dtype=vae_dtype, tiling=None, **common)
    latents = {**untiled, "tiling": choose_tiling(cache, checkpoint, config, vae_dtype, untiled)}
    embeddings = embeddings_fingerprint(checkpoint, dtype=text_dtype, **common)
    images = images_fingerprint(latents, config.image_variants) if checkpoint.facts.image_to_video else None
    return Stores(
        latents=cache.store("latents", latents),
        images=cache.store("images", images) if images else None,
        embeddings=cache.store("embeddings", embeddings),
        vae_dtype=vae_dtype,
        text_dtype=text_dtype,
    )


def plan_clips(spool: Spool, config: PreprocessConfig, checkpoint: Checkpoint) -> None:
    """Give the spool what becomes of its records, whose videos it must know."""
    for row, record in spool.records():
        source = spool.source(record.path)
        assert source is not None
        for clip in plan_record(record, source, config, checkpoint.facts):
            spool.add_clip(row, clip)
