"""`--plan`: what a run would do, and how long it would take, before anything is written."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from preprocess.clips import DecodeAhead
from preprocess.config import PreprocessConfig
from preprocess.decode import DecodePool
from preprocess.fingerprints import tile_geometry
from preprocess.missing import find_missing
from preprocess.plan import refusal
from preprocess.prepare import open_model, open_stores, plan_clips, read_manifest
from preprocess.publish import Stores
from preprocess.sources import Sources
from preprocess.spool import Job, Spool
from preprocess.validation import check_pictures
from shared.cache import Cache
from shared.errors import REJECTION_REASONS, UserError, VideoError
from shared.models import Checkpoint

GIB = 2**30
PROBED = 4  # clips that are read to learn how long one takes; as many are encoded as a batch has
BESIDE = 1.02  # bytes of tars, indexes and previews over those of their arrays, at native size


def forecast(config: PreprocessConfig) -> Iterator[str]:
    """The lines to print. Nothing is written: what is learnt of the videos is forgotten.

    Raises:
        UserError: as `preprocess`.
    """
    check_pictures(config.validation_rows)
    with Spool() as spool:
        read_manifest(config, spool)
        checkpoint = open_model(config)
        cache = Cache(config.cache)
        stores = open_stores(cache, checkpoint, config)
        with DecodePool(config.decoders, config.decode_timeout) as pool:
            Sources(cache, spool, None).learn(pool, retry=config.retry_rejected)
            plan_clips(spool, config, checkpoint)
            find_missing(spool, stores, config)
            samples, rejected = spool.counts()
            if not samples and config.num_workers == 1:  # a worker may have none, or reject all of its own
                raise UserError(refusal(samples, rejected, next(spool.rejected())[1]))
            yield f"clips     {samples} of {samples + rejected}"
            for reason, count in sorted(spool.rejections().items()):
                yield f"rejected  {count} {reason}: {REJECTION_REASONS[reason]}"
            for bucket, count in sorted(Counter(str(sample.bucket) for _, _, sample in spool.samples()).items()):
                yield f"bucket    {bucket}: {count} clips"
            prompts, missing_prompts = spool.prompt_counts()
            yield f"missing   {spool.job_count} clips to read, {missing_prompts} of {prompts} prompts"
            size_bytes = cache_bytes(spool, config, checkpoint, stores)
            yield f"bytes     {size_bytes / 1e9:,.3f} GB will be written"
            yield from _memory(spool, config, checkpoint, stores)
            if spool.job_count or missing_prompts:
                seconds = _seconds(spool, pool, config, checkpoint, stores)
                yield f"time      about {_told(seconds)} here, after a probe of a few clips"


def _memory(spool: Spool, config: PreprocessConfig, checkpoint: Checkpoint, stores: Stores) -> Iterator[str]:
    """What the models hold at their peak: T5, then, T5 gone, the VAE; as the run would encode, and the other way."""
    from preprocess.memory import text_peak, video_peak  # late: torch

    prompts = text_peak(checkpoint, dtype=stores.text_dtype, batch=config.text_batch_size)
    how = f"{config.text_batch_size} prompts at a time, in {stores.text_dtype}"
    yield f"memory    T5 {prompts / GIB:.2f} GiB for {how}; a GPU with less takes it layer by layer"
    other = tile_geometry(checkpoint) if stores.tiling is None else None
    for bucket in sorted({sample.bucket for _, _, sample in spool.samples()}, key=str):
        told = []
        for tiling in (stores.tiling, other):
            peak = video_peak(checkpoint, bucket, dtype=stores.vae_dtype, batch=config.vae_batch_size, tiling=tiling,
                              slicing=config.enable_slicing)  # fmt: skip
            how = "untiled" if tiling is None else f"in tiles of {tiling['height']}x{tiling['width']}"
            told.append(f"{peak / GIB:.2f} GiB {how}")
        yield f"memory    VAE {told[0]} ({told[1]}) for {config.vae_batch_size} x {bucket}, in {stores.vae_dtype}"


def cache_bytes(spool: Spool, config: PreprocessConfig, checkpoint: Checkpoint, stores: Stores) -> int:
    """Bytes that what is missing will take in the cache."""
    facts, value_bytes = checkpoint.facts, np.dtype(config.cache_dtype).itemsize
    values = 0
    images: set[bytes] = set()
    for job in spool.jobs():
        frames, height, width = job.sample.bucket.latent_shape
        values += len(job.keys) * 2 * facts.latent_channels * frames * height * width
        if stores.images and job.image_key and job.image_key not in images:
            images.add(job.image_key)
            values += config.image_variants * 2 * facts.latent_channels * height * width
    _, prompts = spool.prompt_counts()
    values += prompts * facts.max_text_seq_length * facts.text_embed_dim
    return round(values * value_bytes * BESIDE)


def _seconds(spool: Spool, pool: DecodePool, config: PreprocessConfig, checkpoint: Checkpoint, stores: Stores) -> float:
    """Seconds that the run will take on this machine, from a few of the missing prompts and clips."""
    from preprocess.encode import TextEncoder, VideoEncoder  # late: torch
    from shared.models import choose_device

    seconds = 0.0
    _, missing = spool.prompt_counts()
    if missing:
        text_encoder = TextEncoder(checkpoint, stores.text_dtype, config.cache_dtype)
        texts = [text for _, text in islice(spool.missing_prompts(), config.text_batch_size)]
        seconds += _second_time(lambda: text_encoder.encode(texts)) / len(texts) * missing
        del text_encoder
    voxels = sum(_voxels(job) * max(len(job.keys), 1) for job in spool.jobs())
    if voxels:
        shape = next(spool.jobs()).sample.bucket
        alike = (job for job in spool.jobs() if job.sample.bucket == shape and job.keys)
        started = time.perf_counter()
        with DecodeAhead(islice(alike, max(PROBED, config.vae_batch_size)), pool) as ahead:
            clips = [(job, read) for job, read in ahead if not isinstance(read, VideoError)]
        read_s = time.perf_counter() - started
        if not clips:
            raise UserError(f"--plan: none of the first {PROBED} clips could be read; run without it to see which")
        encoder = VideoEncoder(
            checkpoint, stores.vae_dtype, config.cache_dtype, slicing=config.enable_slicing, tiling=stores.tiling
        )
        batch = np.stack([read.frames for _, read in clips[: config.vae_batch_size]])
        encode_s = _second_time(lambda: encoder.encode(batch)) / len(batch)
        read_s /= len(clips)
        together = read_s + encode_s if choose_device() == "cpu" else max(read_s, encode_s)  # the same cores, or not
        seconds += together * voxels / _voxels(clips[0][0])
    return seconds


def _voxels(job: Job) -> int:
    """Pixels of a clip's frames, all together: time goes with them."""
    bucket = job.sample.bucket
    return len(job.frame_indices) * bucket.height * bucket.width


def _second_time(work: Callable[[], object]) -> float:
    """Seconds that the work takes when it is done again."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _told(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
