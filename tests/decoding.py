"""Stage 1 without what takes its time: decoding in the test's own process, and no VAE."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np

from preprocess.decode import Clip, make_preview
from preprocess.probe import probe
from preprocess.video import read_frames


class InProcessPool:
    """Stands in for `preprocess.pipeline.DecodePool`.

    Attributes:
        probed: the paths that any of them probed.
    """

    probed: list[str] = []  # noqa: RUF012

    def __init__(self, workers: int, timeout: float) -> None:
        pass

    def __enter__(self) -> InProcessPool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def probe(self, path: str) -> Future[Any]:
        """As DecodePool."""
        self.probed.append(path)
        return _done(lambda: probe(path))

    def read(self, path: str, probe: Any, indices: Any, placement: Any, preview: bool) -> Future[Clip]:
        """As DecodePool."""
        frames = _done(lambda: read_frames(path, probe, indices, placement))
        return _done(lambda: Clip(frames.result(), make_preview(frames.result()) if preview else None))


def encode_nothing(encoder: Any, frames: np.ndarray) -> np.ndarray:
    """Stands in for `preprocess.encode.VideoEncoder.encode`: zeros of the right shape."""
    batch, count, height, width, _ = frames.shape
    return np.zeros((batch, 32, (count + 3) // 4, height // 8, width // 8), encoder._cache_dtype)


def _done(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
