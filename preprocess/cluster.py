"""`--engine ray`: units of prompts and clips go to actors of a Ray cluster; this process, the driver, counts.

    driver   manifest, sources, plan -> units of --shard_size -> ... -> refusals and counts, the data set
    actors                                            encode, publish -> answer

The cache is where they meet: parts go there from the nodes that make them, so that an actor that is lost takes nothing
along but the unit at its encoder and the next one. These are compared with the cache, and what is missing of them goes
to another actor; what a dead one published and could not tell any more is counted, but for its bytes.

Few units are in flight, so that the driver's memory grows with the cluster and not with the clips. Sources are digested
and probed by the driver: once in a cache's life, and remembered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from preprocess.actor import Answer, Encoder
from preprocess.config import PreprocessConfig
from preprocess.crew import Crew, Split
from preprocess.publish import Stores
from preprocess.spool import Job, Spool, batched
from preprocess.units import Failure, Made
from preprocess.validation import alone_prompts
from shared.cache import Cache
from shared.console import Progress
from shared.errors import VideoError
from shared.models import Checkpoint

Prompt = tuple[bytes, str]


class RayEngine:
    """The engine of `--engine ray`; where nothing is missing, no Ray is started."""

    def __init__(
        self, cache: Cache, stores: Stores, checkpoint: Checkpoint, config: PreprocessConfig, spool: Spool
    ) -> None:
        self._stores, self._spool = stores, spool
        self._shard_size = config.shard_size
        self._made = Made()
        facts: dict[str, dict[str, Any] | None] = {
            kind: store.facts if store else None for kind, store in _by_kind(stores).items()
        }
        self._crew = Crew(
            config.ray_address, Encoder, _for_nodes(cache, checkpoint, config), facts, alone_prompts(config)
        )
        _, prompts = spool.prompt_counts()
        self._is_needed = bool(prompts or spool.job_count)

    def __enter__(self) -> RayEngine:
        if self._is_needed:
            self._crew.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_needed:
            self._crew.__exit__(kind, error, trace)

    @property
    def made(self) -> Made:
        """As Engine."""
        return self._made

    def encode_prompts(self) -> None:
        """As Engine."""
        _, missing = self._spool.prompt_counts()
        units = batched(self._spool.missing_prompts(), self._shard_size)
        with Progress[Prompt](total=missing, name="prompts", unit="prompt") as bar:
            for prompts, answer in self._crew.work("encode_prompts", units, self._units(missing), self._split_prompts):
                self._count(answer)
                bar.update(len(prompts))
        self._stores.embeddings.refresh()

    def encode_clips(self) -> Iterator[Failure]:
        """As Engine."""
        count = self._spool.job_count
        units = batched(self._spool.jobs(), self._shard_size)
        with Progress[Job](total=count, name="clips", unit="clip") as bar:
            for jobs, answer in self._crew.work("encode_clips", units, self._units(count), self._split_jobs):
                self._count(answer)
                by_key = {job.sample.latent_key: job for job in jobs}
                for key, reason, detail in answer.failures:
                    job = by_key[key]
                    source = self._spool.source(job.source.path)  # with the verdicts of its other clips
                    yield replace(job, source=source or job.source), VideoError(reason, detail)
                bar.update(len(jobs))
        self._refresh_clips()

    def _units(self, count: int) -> int:
        return -(-count // self._shard_size)

    def _count(self, answer: Answer) -> None:
        self._made.keys.update(answer.made.keys)
        self._made.bytes.update(answer.made.bytes)

    def _refresh_clips(self) -> None:
        self._stores.latents.refresh()
        if self._stores.images:
            self._stores.images.refresh()

    def _split_prompts(self, prompts: list[Prompt]) -> Split[Prompt]:
        self._stores.embeddings.refresh()
        found = self._stores.embeddings.find([key for key, _ in prompts]) >= 0
        missing = [prompt for prompt, is_there in zip(prompts, found, strict=True) if not is_there]
        there = [prompt for prompt, is_there in zip(prompts, found, strict=True) if is_there]
        return missing, there, Answer(Made(Counter(embeddings=len(there))))

    def _split_jobs(self, jobs: list[Job]) -> Split[Job]:
        self._refresh_clips()
        missing, there, made = [], [], Made()
        for job in jobs:
            left = _left(job, self._stores)
            made.keys["latents"] += len(job.keys) - len(left.keys)
            made.keys["images"] += (job.image_key is not None) - (left.image_key is not None)
            if left.keys or left.image_key is not None:
                missing.append(left)
            else:
                there.append(job)
        return missing, there, Answer(made)


def _left(job: Job, stores: Stores) -> Job:
    """The job with what the stores lack of it."""
    keys = {mirrored: key for mirrored, key in job.keys.items() if stores.latents.find([key])[0] < 0}
    image_key = job.image_key
    if image_key is not None and stores.images is not None and stores.images.find([image_key])[0] >= 0:
        image_key = None
    return replace(job, keys=keys, image_key=image_key)


def _by_kind(stores: Stores) -> dict[str, Any]:
    return {"latents": stores.latents, "images": stores.images, "embeddings": stores.embeddings}


def _for_nodes(cache: Cache, checkpoint: Checkpoint, config: PreprocessConfig) -> PreprocessConfig:
    """The configuration as it holds in any folder: absolute paths, and the commit that the driver has.

    Validation's rows and pictures are the driver's to read and to publish.
    """
    folder = None if config.cache_dir is None else str(Path(config.cache_dir).expanduser().absolute())
    return replace(
        config,
        cache=cache.url,
        pretrained_model_name_or_path=checkpoint.name,
        revision=checkpoint.revision,
        cache_dir=folder,
        validation_prompt=None,
        validation_prompts=None,
        validation_images=None,
    )
