"""Stage 1 without what takes its time: decoding in the test's own process, and no models."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from preprocess import encode, pipeline, units
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


class StandInTextEncoder:
    """Stands in for `preprocess.encode.TextEncoder`: an array that tells its prompt, a token a word."""

    def __init__(self, checkpoint: Any, dtype: str, cache_dtype: str) -> None:
        self._shape = (checkpoint.facts.max_text_seq_length, checkpoint.facts.text_embed_dim)
        self._cache_dtype = cache_dtype

    def count_tokens(self, prompts: list[str]) -> list[int]:
        """As TextEncoder."""
        return [len(prompt.split()) + 1 for prompt in prompts]

    def encode(self, prompts: list[str]) -> np.ndarray:
        """As TextEncoder."""
        embeds = [np.full(self._shape, zlib.crc32(prompt.encode()) % 10_000) for prompt in prompts]
        return np.stack(embeds).astype(self._cache_dtype)


class StandInVideoEncoder:
    """Stands in for `preprocess.encode.VideoEncoder`: every eighth pixel of every fourth frame."""

    def __init__(self, checkpoint: Any, dtype: str, cache_dtype: str, *, slicing: bool, tiling: bool) -> None:
        self._cache_dtype = cache_dtype

    def encode_later(self, frames: np.ndarray) -> Any:
        """As VideoEncoder."""
        return SimpleNamespace(array=lambda: self.encode(frames))

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """As VideoEncoder."""
        few = frames[:, ::4, ::8, ::8].mean(-1)[:, None]
        return np.repeat(few, 32, axis=1).astype(self._cache_dtype)


def use_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Let stage 1 do all that it does, but for decoding in children and running models."""
    patch.setattr(pipeline, "DecodePool", InProcessPool)
    patch.setattr(units, "gc", SimpleNamespace(collect=lambda: 0))  # there is no T5 to free
    patch.setattr(encode, "TextEncoder", StandInTextEncoder)
    patch.setattr(encode, "VideoEncoder", StandInVideoEncoder)


def _done(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except Exception as error:
        future.set_exception(error)
    return future
