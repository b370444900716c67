"""Stage 1 from the manifest to the data set.

    manifest -> records -> what is known of their videos -> clips with keys -> minus what the cache has
    -> T5 over the missing prompts, freed -> VAE over the missing clips, decoded ahead of it -> a data set version

What the run knows of its clips is spooled to the disk (preprocess/spool.py). A unit of work (`--shard_size` clips or
prompts) becomes one part of the cache, published in one go: whatever happens, what was published stays, and the next
run makes the rest.
"""

from __future__ import annotations

import errno
import heapq
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

from preprocess.config import PreprocessConfig
from preprocess.decode import DecodePool
from preprocess.engine import check_engine, open_engine
from preprocess.missing import find_missing
from preprocess.plan import Rejected, refusal
from preprocess.prepare import open_model, open_stores, plan_clips, read_manifest
from preprocess.publish import Stores, dataset_info, publish, sample_rows
from preprocess.report import Report
from preprocess.share import merge, rejected_row, waiting_for, write_share
from preprocess.sources import Sources
from preprocess.spool import Spool
from preprocess.units import Made
from preprocess.validation import check_pictures, prompt_entries, publish_pictures
from shared.cache import Cache
from shared.errors import CacheError, UserError
from shared.models import Checkpoint

SHOWN = 100  # rejected clips that are told one by one; rejected.parquet has them all


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        rejected: the first of them; there are `rejected_count`.
        digest: of the data set version; None: other workers have yet to hand over their shares.
        waiting_for: the `--worker_index` of each of them.
    """

    report: Report
    rejected: list[Rejected]
    rejected_count: int
    digest: str | None
    waiting_for: list[int]


def preprocess(config: PreprocessConfig) -> Outcome:
    """Run stage 1.

    Raises:
        UserError: a manifest, checkpoint or cache that cannot be used; or every clip was rejected, or any with
            `--strict`: then no data set is published, but what was encoded stays in the cache.
    """
    check_engine(config)
    check_pictures(config.validation_rows)
    report = Report()
    with Spool() as spool:
        with report.phase("manifest"):
            manifest_digest = read_manifest(config, spool)
        checkpoint = open_model(config)
        cache = Cache(config.cache)
        with _full_disk_in_one_line(cache), cache.writer() as writer:
            with report.phase("cache"):  # as a writer: nothing found in it now is collected before it is used
                stores = open_stores(cache, checkpoint, config)
                report.tiling = stores.tiling
            made = _encode(cache, writer, config, checkpoint, stores, spool, report)
            _count(report, config, spool, stores, made)
            with report.phase("publish"):
                return _hand_over(cache, writer, config, checkpoint, stores, spool, manifest_digest, report)


def _encode(
    cache: Cache,
    writer: Path,
    config: PreprocessConfig,
    checkpoint: Checkpoint,
    stores: Stores,
    spool: Spool,
    report: Report,
) -> Made:
    """Learn of the videos and encode what is missing; what fails is refused in the spool."""
    sources = Sources(cache, spool, writer)
    with DecodePool(config.decoders, config.decode_timeout) as pool:
        try:
            with report.phase("sources"):
                sources.learn(pool, retry=config.retry_rejected)
            with report.phase("plan"):
                plan_clips(spool, config, checkpoint)
                find_missing(spool, stores, config)
            with open_engine(cache, stores, checkpoint, config, spool, writer, pool) as engine:
                with report.phase("prompts"):
                    engine.encode_prompts()
                with report.phase("clips"):
                    for job, error in engine.encode_clips():
                        spool.refuse(job.sample.latent_key, error)
                        sources.reject(job.source, job.sample.latent_key, error)
                return engine.made
        finally:
            sources.save()


def _count(report: Report, config: PreprocessConfig, spool: Spool, stores: Stores, made: Made) -> None:
    report.encoded.update(made.keys)
    report.bytes.update(made.bytes)
    report.rejected.update(spool.rejections())
    wanted, missing = spool.prompt_counts()
    report.reused["embeddings"] = wanted - missing
    versions = 2 if config.random_flip else 1  # a rejected clip's may be encoded
    report.reused["latents"] = max(versions * spool.distinct("latent_key") - made.keys["latents"], 0)
    if stores.images:
        report.reused["images"] = max(spool.distinct("image_key") - made.keys["images"], 0)


def _hand_over(
    cache: Cache,
    writer: Path,
    config: PreprocessConfig,
    checkpoint: Checkpoint,
    stores: Stores,
    spool: Spool,
    manifest_digest: str,
    report: Report,
) -> Outcome:
    """Publish the data set; as one of several workers hand over the share, and publish where it is the last one."""
    name, workers = config.dataset, config.num_workers
    info = dataset_info(config, checkpoint, stores)
    rejected = [clip for _, clip in islice(spool.rejected(), SHOWN)]
    samples, rejected_count = spool.counts()
    rows = sample_rows(
        ((row, sample) for _, row, sample in spool.samples()), stores, checkpoint.facts.max_text_seq_length
    )
    prompts = {}
    if config.worker_index == 0:
        places = publish_pictures(cache, writer, config.validation_rows)
        prompts = prompt_entries(config, stores.embeddings, places)
    if workers == 1:
        if not samples or (rejected and config.strict):
            raise UserError(refusal(samples, rejected_count, rejected[0]))
        told = {**info, **prompts}
        digest = publish(cache, writer, name, told, rows, (clip.row() for _, clip in spool.rejected()), report)
        return Outcome(report, rejected, rejected_count, digest, [])

    refused = (rejected_row(row, clip) for row, clip in spool.rejected())
    clips = heapq.merge(report.counted(rows), refused, key=itemgetter("manifest_row"))
    run = write_share(cache, writer, config, info, prompts or None, manifest_digest, clips, report)
    missing = waiting_for(cache, name, workers, run)
    if missing:
        return Outcome(report, rejected, rejected_count, None, missing)
    merged, digest = merge(cache, writer, name, workers)
    return Outcome(merged, rejected, rejected_count, digest, [])


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
