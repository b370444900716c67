"""Stage 1 from the manifest to the data set.

    manifest -> records -> what is known of their videos -> samples with keys -> minus what the cache has
    -> T5 over the missing prompts, freed -> VAE over the missing clips, decoded ahead of it -> a data set version

A unit of work (`--shard_size` clips or prompts) becomes one part of the cache, published in one go: whatever happens,
what was published stays, and the next run makes the rest.
"""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tqdm import tqdm

from preprocess.clips import ClipJob, ClipWriter, DecodeAhead
from preprocess.config import PreprocessConfig
from preprocess.decode import DecodePool
from preprocess.fingerprints import embeddings_fingerprint, images_fingerprint, latents_fingerprint, tile_geometry
from preprocess.manifest import Record, iter_manifest
from preprocess.plan import Rejected, Sample, plan_samples
from preprocess.publish import Stores, publish
from preprocess.report import Report
from preprocess.seams import seam_lines
from preprocess.sources import Source, Sources
from preprocess.tiling import choose_tiling
from shared.cache import Cache, Store, embedding_key
from shared.errors import CacheError, UserError, VideoError
from shared.models import Checkpoint, choose_dtype, open_checkpoint
from shared.prompts import user_prompt
from shared.shards import ShardWriter
from shared.storage import canonical_json


def preprocess(config: PreprocessConfig) -> tuple[Report, list[Rejected], str]:
    """Run stage 1.

    Returns:
        The report, the rejected clips, and the digest of the data set version.

    Raises:
        UserError: a manifest, checkpoint or cache that cannot be used; or every clip was rejected, or any with
            `--strict`: then no data set is published, but what was encoded stays in the cache.
    """
    report = Report()
    with report.phase("manifest"):
        records = _read_records(config)
    checkpoint = _open_checkpoint(config)
    cache = Cache(config.cache)
    decoders = config.dataloader_num_workers or min(max((os.cpu_count() or 2) - 1, 1), 8)
    with _full_disk_in_one_line(cache), cache.writer() as writer, DecodePool(decoders, config.decode_timeout) as pool:
        with report.phase("cache"):  # as a writer: nothing that is found in it now is collected before it is used
            stores, sources = _open_stores(cache, checkpoint, config), Sources(cache)
            report.tiling = stores.tiling
        try:
            with report.phase("sources"):
                videos = sources.learn(records, pool, writer, retry=config.retry_rejected)
            planned = list(plan_samples(records, videos, config, checkpoint.facts))
            jobs, refused = _missing_clips(planned, stores, videos)
            prompts = _prompts(config, planned)
            with DecodeAhead(jobs, pool) as ahead:  # decoding starts while T5 is still at work
                with report.phase("prompts"):
                    _encode_prompts(prompts, stores, checkpoint, config, writer, report)
                with report.phase("clips"):
                    for job, error in _encode_clips(ahead, stores, checkpoint, config, writer, report):
                        refused[job.sample.latent_key] = error
                        sources.reject(job.source, job.sample.latent_key, error, writer)
        finally:
            sources.save(writer)
        samples, rejected = _outcome(planned, refused)
        report.rejected.update(clip.reason for clip in rejected)
        report.buckets.update(str(sample.bucket) for sample in samples)
        latents = len({key for sample in samples for key, _ in sample.versions()})
        report.reused["latents"] = max(latents - report.encoded["latents"], 0)  # a rejected clip's may be encoded
        images = len({sample.image_key for sample in samples if sample.image_key})
        report.reused["images"] = max(images - report.encoded["images"], 0)
        if not samples or (rejected and config.strict):
            raise UserError(_refusal(samples, rejected))
        with report.phase("publish"):
            digest = publish(cache, writer, config, checkpoint, stores, samples, rejected, report)
    return report, rejected, digest


def check_tiling(config: PreprocessConfig) -> Iterator[str]:
    """What tiles change, in a few of the clips: a line for the tiles, then one for each clip.

    The tiles are those that a run with this configuration would take; the VAE's own, where it would take none. The
    cache learns what there is to know of the videos, and nothing else is written.

    Raises:
        UserError: as `preprocess`.
    """
    records = _read_records(config)
    checkpoint = _open_checkpoint(config)
    cache = Cache(config.cache)
    stores, sources = _open_stores(cache, checkpoint, config), Sources(cache)
    with cache.writer() as writer, DecodePool(1, config.decode_timeout) as pool:
        videos = sources.learn(records, pool, writer, retry=config.retry_rejected)
        sources.save(writer)
        planned = list(plan_samples(records, videos, config, checkpoint.facts))
        samples = [sample for sample in planned if isinstance(sample, Sample)]
        if not samples:
            raise UserError(_refusal([], [clip for clip in planned if isinstance(clip, Rejected)]))
        from preprocess.encode import VideoEncoder  # late: torch

        tiling = stores.tiling or tile_geometry(checkpoint)
        size = f"{tiling['height']}x{tiling['width']}"
        told = "as this run would take" if stores.tiling else "the VAE's own: this run would take none"
        yield f"tiles     {size} pixels, {told}; differences from untiled in the latents' standard deviation"
        encoder = VideoEncoder(checkpoint, stores.vae_dtype, "float32", slicing=False, tiling=None)
        yield from seam_lines(encoder, pool, samples, tiling)


def _open_checkpoint(config: PreprocessConfig) -> Checkpoint:
    checkpoint = open_checkpoint(
        config.pretrained_model_name_or_path,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
        weights=("vae", "text_encoder"),
    )
    config.check(checkpoint.facts)  # a size that it cannot take is refused before anything is opened
    return checkpoint


@contextmanager
def _full_disk_in_one_line(cache: Cache) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CacheError(
            f"{cache.url}: its disk is full ({error.strerror}); make room and run the same command again: "
            "what was published stays"
        ) from error


def _read_records(config: PreprocessConfig) -> list[Record]:
    rows = iter_manifest(
        dataset_name=config.dataset_name,
        dataset_config_name=config.dataset_config_name,
        instance_data_root=config.instance_data_root,
        caption_column=config.caption_column,
        video_column=config.video_column,
        follow_links=config.follow_links,
        cache_dir=config.cache_dir,
    )
    return list(tqdm(rows, desc="manifest", unit="clip", disable=None))


def _open_stores(cache: Cache, checkpoint: Checkpoint, config: PreprocessConfig) -> Stores:
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


def _missing_clips(
    planned: Sequence[Sample | Rejected], stores: Stores, videos: dict[str, Source]
) -> tuple[list[ClipJob], dict[bytes, VideoError]]:
    """What must be encoded, each key once; and the clips whose reading is known to fail."""
    refused: dict[bytes, VideoError] = {}
    wanted: dict[bytes, tuple[Sample, bool]] = {}
    images: dict[bytes, list[Sample]] = {}  # any of them may fail to be read, and must not take the others with it
    for sample in planned:
        if isinstance(sample, Sample):
            for key, placement in sample.versions():
                wanted.setdefault(key, (sample, placement.mirrored))
            if sample.image_key:
                images.setdefault(sample.image_key, []).append(sample)
    missing: dict[bytes, ClipJob] = {}

    def job_for(sample: Sample) -> ClipJob | None:
        source = videos[sample.record.path]
        verdict = source.verdicts.get(sample.latent_key.hex())
        if verdict:
            refused[sample.latent_key] = VideoError(*verdict)
            return None
        return missing.setdefault(sample.latent_key, ClipJob(sample, source))

    # Nothing is missing that is in its store, whatever the verdict on its video: it was read once.
    for (key, (sample, mirrored)), row in zip(wanted.items(), stores.latents.find(list(wanted)), strict=True):
        if row < 0 and (job := job_for(sample)):
            job.keys[mirrored] = key
    if stores.images:
        for (key, sharing), row in zip(images.items(), stores.images.find(list(images)), strict=True):
            for sample in sharing if row < 0 else ():
                if job := job_for(sample):
                    job.image_key = key
    return list(missing.values()), refused


def _prompts(config: PreprocessConfig, planned: Sequence[Sample | Rejected]) -> list[str]:
    """The prompts to have, each once: the empty one, the samples', the validation videos'."""
    captions = (sample.prompt for sample in planned if isinstance(sample, Sample))
    validation = (user_prompt(text, config.id_token) for text in config.validation_prompts())
    return list(dict.fromkeys(["", *captions, *validation]))


def _encode_prompts(
    prompts: list[str], stores: Stores, checkpoint: Checkpoint, config: PreprocessConfig, writer: Path, report: Report
) -> None:
    keys = [embedding_key(prompt) for prompt in prompts]
    rows = stores.embeddings.find(keys)
    missing = [prompt for prompt, row in zip(prompts, rows, strict=True) if row < 0]
    report.reused["embeddings"] = len(prompts) - len(missing)
    if not missing:
        return
    from preprocess.encode import TextEncoder  # late: a run that misses nothing imports no torch

    encoder = TextEncoder(checkpoint, stores.text_dtype, config.cache_dtype)
    alone = {"", *(user_prompt(text, config.id_token) for text in config.validation_prompts())}
    with tqdm(total=len(missing), desc="prompts", unit="prompt", disable=None) as bar:
        for start in range(0, len(missing), config.shard_size):
            batches = _text_batches(missing[start : start + config.shard_size], alone, config.text_batch_size)
            with _part(stores.embeddings, writer, report) as shard:
                for texts in batches:
                    embeds, tokens = encoder.encode(texts), encoder.count_tokens(texts)
                    for text, array, count in zip(texts, embeds, tokens, strict=True):
                        facts = canonical_json({"tokens": count})  # in the tar too: an index can be made again from it
                        shard.add(embedding_key(text), {"prompt_embeds.npy": array, "json": facts}, tokens=count)
                    bar.update(len(texts))
    del encoder
    gc.collect()  # T5 leaves before the VAE comes


def _text_batches(prompts: list[str], alone: set[str], size: int) -> Iterator[list[str]]:
    """Batches of prompts; those in `alone` by themselves, as stage 3 encodes them, so that it gets the same bits."""
    others = [prompt for prompt in prompts if prompt not in alone]
    yield from ([prompt] for prompt in prompts if prompt in alone)
    yield from (others[start : start + size] for start in range(0, len(others), size))


def _encode_clips(
    ahead: DecodeAhead,
    stores: Stores,
    checkpoint: Checkpoint,
    config: PreprocessConfig,
    writer: Path,
    report: Report,
) -> Iterator[tuple[ClipJob, VideoError]]:
    """Encode the missing clips, unit by unit; those that could not be read or encoded come out."""
    if not ahead.jobs:
        return
    from preprocess.encode import VideoEncoder  # late: a run that misses nothing imports no torch

    encoder = VideoEncoder(
        checkpoint, stores.vae_dtype, config.cache_dtype, slicing=config.enable_slicing, tiling=stores.tiling
    )
    done: set[bytes] = set()
    with tqdm(total=len(ahead.jobs), desc="clips", unit="clip", disable=None) as bar:
        for start in range(0, len(ahead.jobs), config.shard_size):
            images = _part(stores.images, writer, report) if stores.images else nullcontext()
            with _part(stores.latents, writer, report) as shard, images as image_shard:
                clips = ClipWriter(encoder, shard, config.vae_batch_size, image_shard, config.image_variants, done)
                for _ in ahead.jobs[start : start + config.shard_size]:
                    job, read = ahead.next()
                    if isinstance(read, VideoError):
                        yield job, read
                    else:
                        clips.add(job, read)
                    bar.update()
                clips.finish()
            yield from clips.failed


@contextmanager
def _part(store: Store, writer: Path, report: Report) -> Iterator[ShardWriter]:
    """A part in the making: published when the block ends, unless it is empty or the block fails."""
    folder = writer / store.kind  # moments and images are made side by side
    folder.mkdir(exist_ok=True)
    shard = ShardWriter(folder)
    try:
        yield shard
        if shard.keys:
            finished = shard.finish()
            report.bytes[store.kind] += finished.size_bytes + finished.index.stat().st_size
            report.encoded[store.kind] += shard.keys
            store.publish(finished)
    finally:
        shard.abandon()


def _outcome(
    planned: Sequence[Sample | Rejected], refused: dict[bytes, VideoError]
) -> tuple[list[Sample], list[Rejected]]:
    """The samples that stand and the clips that do not, both in manifest order."""
    samples, rejected = [], []
    for sample in planned:
        if isinstance(sample, Rejected):
            rejected.append(sample)
        elif sample.latent_key in refused:
            error = refused[sample.latent_key]
            rejected.append(Rejected(sample.record, error.reason, error.detail))
        else:
            samples.append(sample)
    return samples, rejected


def _refusal(samples: list[Sample], rejected: list[Rejected]) -> str:
    first = rejected[0]
    which = f"{len(rejected)} of {len(samples) + len(rejected)} clips were rejected" if samples else (
        f"all {len(rejected)} clips were rejected"
    )  # fmt: skip
    return (
        f"{which}, the first {first.record.origin} {first.record.source}: {first.reason} ({first.detail}); "
        "no data set was published; mend or remove them" + (", or leave out --strict" if samples else "")
    )
