"""Clips between the decoder and a shard: decoded ahead within a bound of bytes, encoded in batches of one shape."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from preprocess.decode import Clip, DecodePool
from preprocess.plan import Sample
from preprocess.sources import Source
from preprocess.video import PIXELS_VERSION
from shared.errors import VideoError
from shared.shards import ShardWriter
from shared.storage import canonical_json

if TYPE_CHECKING:
    from preprocess.encode import VideoEncoder

AHEAD_BYTES = 1 << 30  # decoded frames that wait for the VAE, at most


@dataclass
class ClipJob:
    """A clip to read once, and the keys that what becomes of it goes under.

    Attributes:
        keys: of its moments, by mirrored or not; none, one or both are to make.
        image_key: of its first frame, where that is to make.
    """

    sample: Sample
    source: Source
    keys: dict[bool, bytes] = field(default_factory=dict)
    image_key: bytes | None = None

    @property
    def frame_indices(self) -> list[int]:
        """The frames to read: the first one alone is enough for an image."""
        return self.sample.frame_indices if self.keys else self.sample.frame_indices[:1]


class DecodeAhead:
    """Reads clips in order, ahead of whoever takes them, in at most AHEAD_BYTES of memory; always at least one."""

    def __init__(self, jobs: list[ClipJob], pool: DecodePool) -> None:
        self.jobs = jobs
        self._pool = pool
        self._waiting: deque[tuple[ClipJob, Future[Clip]]] = deque()
        self._submitted = 0
        self._bytes = 0

    def __enter__(self) -> DecodeAhead:
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, future in self._waiting:
            future.cancel()

    def next(self) -> tuple[ClipJob, Clip | VideoError]:
        """The next clip in order, or why it could not be read."""
        job, future = self._waiting.popleft()
        try:
            read: Clip | VideoError = future.result()
        except VideoError as error:
            read = error
        if not job.source.is_unchanged():  # its key names the bytes that were digested
            read = VideoError("unreadable", "changed or gone since this run looked at it first; run again")
        self._bytes -= _frame_bytes(job)
        self._fill()
        return job, read

    def _fill(self) -> None:
        while self._submitted < len(self.jobs):
            job = self.jobs[self._submitted]
            if self._waiting and self._bytes + _frame_bytes(job) > AHEAD_BYTES:
                return
            sample = job.sample
            read = self._pool.read(
                sample.record.path, sample.probe, job.frame_indices, sample.placement, preview=bool(job.keys)
            )
            self._waiting.append((job, read))
            self._bytes += _frame_bytes(job)
            self._submitted += 1


def _frame_bytes(job: ClipJob) -> int:
    bucket = job.sample.bucket
    return len(job.frame_indices) * bucket.height * bucket.width * 3


class ClipWriter:
    """Encodes clips in batches of one shape, and their first frames, and adds what comes out to shards.

    Args:
        shard: for moments.
        image_shard: for first frames, with `image_variants` noises each.
        images_done: keys that this run has encoded: clips may share a first frame. Those that come are added.

    Attributes:
        failed: clips whose encodings are not finite.
    """

    def __init__(
        self,
        encoder: VideoEncoder,
        shard: ShardWriter,
        batch_size: int,
        image_shard: ShardWriter | None = None,
        image_variants: int = 0,
        images_done: set[bytes] | None = None,
    ) -> None:
        self.failed: list[tuple[ClipJob, VideoError]] = []
        self._encoder, self._shard, self._batch_size = encoder, shard, batch_size
        self._image_shard, self._image_variants = image_shard, image_variants
        self._images_done = set() if images_done is None else images_done
        self._waiting: dict[tuple[int, ...], list[tuple[ClipJob, bool, np.ndarray, bytes | None]]] = {}

    def add(self, job: ClipJob, clip: Clip) -> None:
        """Take a clip that was read; its mirror image is made here, from the same frames."""
        if job.image_key is not None and job.image_key not in self._images_done:
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

    def _encode(self, batch: list[tuple[ClipJob, bool, np.ndarray, bytes | None]]) -> None:
        moments = self._encoder.encode(np.stack([frames for _, _, frames, _ in batch]))
        for (job, mirrored, _, preview), array in zip(batch, moments, strict=True):
            if not self._is_finite(job, array):
                continue
            members: dict[str, np.ndarray | bytes] = {"moments.npy": array, "json": _facts(job.sample, mirrored)}
            if preview is not None:
                members["preview.jpg"] = preview
            self._shard.add(job.keys[mirrored], members)

    def _encode_image(self, job: ClipJob, key: bytes, frame: np.ndarray) -> None:
        from preprocess.images import noised_images  # late: torch

        assert self._image_shard is not None
        noised, sigmas = noised_images(frame, key, self._image_variants)
        array = self._encoder.encode_images(noised)
        if self._is_finite(job, array):
            self._image_shard.add(key, {"image.npy": array, "json": _image_facts(job.sample, sigmas)})
            self._images_done.add(key)

    def _is_finite(self, job: ClipJob, array: np.ndarray) -> bool:
        bad = int(np.count_nonzero(~np.isfinite(array)))
        if bad:
            detail = f"{bad} of {array.size} values of the VAE's encoding; give --dtype float32"
            self.failed.append((job, VideoError("non_finite", detail)))
        return not bad


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
