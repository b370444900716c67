"""Units of work: so many prompts or clips (`--shard_size`) become one part of the cache, published in one go.

What an encoder makes is written and published by a thread, while the next batch is at the encoder.
"""

from __future__ import annotations

import gc
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.clips import DecodeAhead
from preprocess.config import PreprocessConfig
from preprocess.decode import Clip
from preprocess.plan import Sample
from preprocess.publish import Stores
from preprocess.spool import Job, batched
from preprocess.video import PIXELS_VERSION
from shared.cache import Store
from shared.console import Progress
from shared.errors import VideoError
from shared.models import Checkpoint
from shared.shards import ShardWriter
from shared.storage import canonical_json

if TYPE_CHECKING:
    from preprocess.encode import Pending, TextEncoder, VideoEncoder

BATCHES_AHEAD = 4  # encoded batches that wait to be written, at most

Failure = tuple[Job, VideoError]
Members = dict[str, np.ndarray | bytes]


@dataclass
class Made:
    """What was put into the cache, by kind of store: keys, and bytes of tars and indexes."""

    keys: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)


class Part:
    """One part in the making: it is published as a whole, or nothing of it is.

    Args:
        folder: of the writer, for this part alone.
    """

    def __init__(self, store: Store, folder: Path, made: Made) -> None:
        folder.mkdir()
        self._store, self._folder, self._made = store, folder, made
        self._shard = ShardWriter(folder)
        self.keys: set[bytes] = set()

    def add(self, key: bytes, members: Members, tokens: int | None = None) -> None:
        """Add the members of a key, unless it is there."""
        if key not in self.keys:
            self._shard.add(key, members, tokens)
            self.keys.add(key)

    def publish(self) -> None:
        """Finish the part and make it visible; an empty one comes to nothing."""
        if self.keys:
            finished = self._shard.finish()
            size_bytes = finished.size_bytes + finished.index.stat().st_size
            self._store.publish(finished)
            self._made.keys[self._store.kind] += len(self.keys)
            self._made.bytes[self._store.kind] += size_bytes
        self.abandon()

    def abandon(self) -> None:
        """Remove what is left of it."""
        self._shard.abandon()
        shutil.rmtree(self._folder, ignore_errors=True)  # what is left goes with the writer's folder


class Publisher:
    """A thread that writes and publishes in the order of the calls; what fails there is raised at the next call here.

    Leaving the context waits for it; with an exception what is not published is abandoned.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._room = threading.BoundedSemaphore(BATCHES_AHEAD)
        self._error: BaseException | None = None
        self._open: list[Part] = []
        self._last: Future[None] | None = None

    def __enter__(self) -> Publisher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._thread.shutdown(cancel_futures=kind is not None)
        for part in self._open:
            part.abandon()
        if kind is None:
            self._check()

    def open(self, part: Part) -> Part:
        """Take charge of a part."""
        self._open.append(part)
        return part

    def do(self, task: Callable[..., None], *args: Any) -> None:
        """Have the thread do something; waits while BATCHES_AHEAD such tasks are not done."""
        self._check()
        self._room.acquire()
        self._thread.submit(self._run, task, args).add_done_callback(lambda _: self._room.release())

    def publish(self, parts: Sequence[Part]) -> None:
        """Have the thread publish parts, after what it was given to do before; waits for those of the time before."""
        if self._last:
            self._last.result()
        self._check()
        self._last = self._thread.submit(self._run, self._publish, (parts,))

    def _run(self, task: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self._error is None:
            try:
                task(*args)
            except BaseException as error:  # whatever it is, the caller that goes on must hear of it
                self._error = error

    def _publish(self, parts: Sequence[Part]) -> None:
        for part in parts:
            part.publish()
            self._open.remove(part)

    def _check(self) -> None:
        if self._error is not None:
            raise self._error


class Units:
    """Encodes and publishes units, in this process and on its device. T5 and the VAE are never resident together.

    Args:
        writer: the writer's folder.
        alone: prompts that are encoded by themselves, of `validation.alone_prompts`.
    """

    def __init__(
        self, stores: Stores, checkpoint: Checkpoint, config: PreprocessConfig, writer: Path, alone: frozenset[str]
    ) -> None:
        self.made = Made()
        self._alone = alone
        self._stores, self._checkpoint, self._config, self._writer = stores, checkpoint, config, writer
        self._opened = 0
        self._text: TextEncoder | None = None
        self._video: VideoEncoder | None = None

    def encode_prompts(self, prompts: Iterable[tuple[bytes, str]], total: int) -> None:
        """Encode prompts, each with its key."""
        if not total:
            return
        from preprocess.encode import TextEncoder  # late: a run that misses nothing imports no torch

        self._text = self._text or TextEncoder(self._checkpoint, self._stores.text_dtype, self._config.cache_dtype)
        with Progress[str](total=total, name="prompts", unit="prompt") as bar, Publisher() as publisher:
            for unit in batched(prompts, self._config.shard_size):
                part = publisher.open(self._part(self._stores.embeddings))
                for batch in _text_batches(unit, self._alone, self._config.text_batch_size):
                    texts = [text for _, text in batch]
                    embeds, tokens = self._text.encode(texts), self._text.count_tokens(texts)
                    publisher.do(_add_prompts, part, [key for key, _ in batch], embeds, tokens)
                    bar.update(len(texts))
                publisher.publish([part])

    def forget_text_encoder(self) -> None:
        """T5 leaves before the VAE comes."""
        self._text = None
        gc.collect()

    def encode_clips(self, clips: DecodeAhead, total: int) -> Iterator[Failure]:
        """Encode clips as they are read; those that could not be read or encoded come out."""
        if not total:
            return
        from preprocess.encode import VideoEncoder  # late: a run that misses nothing imports no torch

        self.forget_text_encoder()
        stores, config = self._stores, self._config
        self._video = self._video or VideoEncoder(
            self._checkpoint, stores.vae_dtype, config.cache_dtype, slicing=config.enable_slicing, tiling=stores.tiling
        )
        failed: list[Failure] = []
        images_before: set[bytes] = set()  # of the unit that may still be on its way into the store
        with Progress[Job](total=total, name="clips", unit="clip") as bar, Publisher() as publisher:
            for reads in _units(clips, config.shard_size):
                moments = publisher.open(self._part(stores.latents))
                images = publisher.open(self._part(stores.images)) if stores.images else None
                unit = ClipUnit(self._video, publisher, config, moments, images, images_before, failed)
                for job, read in reads:
                    if isinstance(read, VideoError):
                        yield job, read
                    elif job.image_key is None or stores.images is None or stores.images.find([job.image_key])[0] < 0:
                        unit.add(job, read)
                    else:  # a clip of an earlier unit had the same first frame
                        unit.add(replace(job, image_key=None), read)
                    bar.update()
                unit.finish()
                publisher.publish([part for part in (moments, images) if part])
                images_before = unit.image_keys
        yield from failed

    def _part(self, store: Store) -> Part:
        self._opened += 1
        return Part(store, self._writer / f"part-{self._opened}", self.made)


def _units(clips: DecodeAhead, size: int) -> Iterator[Iterator[tuple[Job, Clip | VideoError]]]:
    """The clips in runs of `size`, each taken to its end before the next; none is read before it is asked for."""
    iterator = iter(clips)
    for first in iterator:
        yield chain([first], islice(iterator, size - 1))


class ClipUnit:
    """Encodes the clips of a unit in batches of one shape, and their first frames.

    Args:
        moments, images: what is encoded is added to these, by the publisher's thread.
        images_before: keys that need not be encoded again.
        failed: clips whose encodings are not finite are added to it.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        publisher: Publisher,
        config: PreprocessConfig,
        moments: Part,
        images: Part | None,
        images_before: set[bytes],
        failed: list[Failure],
    ) -> None:
        self.image_keys: set[bytes] = set()
        self._encoder, self._publisher, self._failed = encoder, publisher, failed
        self._batch_size, self._variants = config.vae_batch_size, config.image_variants
        self._moments, self._images, self._images_before = moments, images, images_before
        self._waiting: dict[tuple[int, ...], list[tuple[Job, bool, np.ndarray, bytes | None]]] = {}

    def add(self, job: Job, clip: Clip) -> None:
        """Take a clip that was read; its mirror image is made here, from the same frames."""
        if job.image_key is not None and job.image_key not in self._images_before | self.image_keys:
            self._encode_image(job, job.image_key, clip.frames[0])
        for mirrored in job.keys:
            frames = np.ascontiguousarray(clip.frames[:, :, ::-1]) if mirrored else clip.frames
            waiting = self._waiting.setdefault(frames.shape, [])
            waiting.append((job, mirrored, frames, None if mirrored else clip.preview))
            if len(waiting) >= self._batch_size:
                self._encode(self._waiting.pop(frames.shape))

    def finish(self) -> None:
        """Encode the batches that are not full."""
        for shape in list(self._waiting):
            self._encode(self._waiting.pop(shape))

    def _encode(self, batch: list[tuple[Job, bool, np.ndarray, bytes | None]]) -> None:
        pending = self._encoder.encode_later(np.stack([frames for _, _, frames, _ in batch]))
        self._publisher.do(self._add, [(job, mirrored, preview) for job, mirrored, _, preview in batch], pending)

    def _add(self, batch: list[tuple[Job, bool, bytes | None]], pending: Pending) -> None:
        for (job, mirrored, preview), array in zip(batch, pending.array(), strict=True):
            if self._is_finite(job, array):
                members: Members = {"moments.npy": array, "json": _facts(job.sample, mirrored)}
                if preview is not None:
                    members["preview.jpg"] = preview
                self._moments.add(job.keys[mirrored], members)

    def _encode_image(self, job: Job, key: bytes, frame: np.ndarray) -> None:
        from preprocess.images import noised_images  # late: torch

        assert self._images is not None
        noised, sigmas = noised_images(frame, key, self._variants)
        array = self._encoder.encode_images(noised)
        if self._is_finite(job, array):  # else the next clip that begins with it must fail too, not do without
            self.image_keys.add(key)
            facts = _image_facts(job.sample, sigmas)
            self._publisher.do(self._images.add, key, {"image.npy": array, "json": facts})

    def _is_finite(self, job: Job, array: np.ndarray) -> bool:
        bad = int(np.count_nonzero(~np.isfinite(array)))
        if bad:
            detail = f"{bad} of {array.size} values of the VAE's encoding; give --dtype float32"
            self._failed.append((job, VideoError("non_finite", detail)))
        return not bad


def _text_batches(
    prompts: list[tuple[bytes, str]], alone: frozenset[str], size: int
) -> Iterator[list[tuple[bytes, str]]]:
    """Batches of prompts; those in `alone` by themselves, as stage 3 encodes them, so that it gets the same bits."""
    yield from ([prompt] for prompt in prompts if prompt[1] in alone)
    yield from batched((prompt for prompt in prompts if prompt[1] not in alone), size)


def _add_prompts(part: Part, keys: list[bytes], embeds: np.ndarray, tokens: list[int]) -> None:
    for key, array, count in zip(keys, embeds, tokens, strict=True):
        facts = canonical_json({"tokens": count})  # in the tar too: an index can be made again from it
        part.add(key, {"prompt_embeds.npy": array, "json": facts}, count)


def _facts(sample: Sample, mirrored: bool) -> bytes:
    """What the key stands for: no path and no caption, as these may change while the key does not."""
    return canonical_json(
        {
            "frame_indices": sample.frame_indices,
            "placement": asdict(replace(sample.placement, mirrored=mirrored)),
            "pixels_version": PIXELS_VERSION,
        }
    )


def _image_facts(sample: Sample, sigmas: list[float]) -> bytes:
    """What an image's key stands for, and the noise level of each variant."""
    return canonical_json(
        {
            "frame_index": sample.frame_indices[0],
            "placement": asdict(sample.placement),
            "pixels_version": PIXELS_VERSION,
            "sigmas": sigmas,
        }
    )
