"""Clips on their way from the decoder to the VAE: read in order, ahead of it, within a bound of bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from types import TracebackType

from preprocess.decode import Clip, DecodePool
from preprocess.spool import Job
from shared.errors import VideoError

AHEAD_BYTES = 1 << 30  # decoded frames that wait for the VAE, at most


class DecodeAhead:
    """Reads clips in order, ahead of whoever takes them, in at most AHEAD_BYTES of memory; always at least one."""

    def __init__(self, jobs: Iterator[Job], pool: DecodePool) -> None:
        self._jobs, self._pool = jobs, pool
        self._next = next(jobs, None)
        self._waiting: deque[tuple[Job, Future[Clip]]] = deque()
        self._bytes = 0

    def __enter__(self) -> DecodeAhead:
        self._fill()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, future in self._waiting:
            future.cancel()

    def __iter__(self) -> Iterator[tuple[Job, Clip | VideoError]]:
        """Each clip in order, or why it could not be read."""
        self._fill()
        while self._waiting:
            job, future = self._waiting.popleft()
            try:
                read: Clip | VideoError = future.result()
            except VideoError as error:
                read = error
            if not job.source.is_unchanged():  # its key names the bytes that were digested
                read = VideoError("unreadable", "changed or gone since this run looked at it first; run again")
            self._bytes -= _frame_bytes(job)
            self._fill()
            yield job, read

    def _fill(self) -> None:
        while self._next is not None:
            job = self._next
            if self._waiting and self._bytes + _frame_bytes(job) > AHEAD_BYTES:
                return
            sample = job.sample
            read = self._pool.read(
                sample.record.path, sample.probe, job.frame_indices, sample.placement, preview=bool(job.keys)
            )
            self._waiting.append((job, read))
            self._bytes += _frame_bytes(job)
            self._next = next(self._jobs, None)


def _frame_bytes(job: Job) -> int:
    bucket = job.sample.bucket
    return len(job.frame_indices) * bucket.height * bucket.width * 3
