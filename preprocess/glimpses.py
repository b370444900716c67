"""What a captioning model is shown of a clip: a few whole frames, spread evenly in time, read ahead of the model.

Shapes: F frames, H and W height and width in pixels.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from preprocess.decode import DecodePool
from preprocess.frames import Placement, spread_frames
from shared.errors import VideoError

Name = TypeVar("Name")
Segment = tuple[str, float | None, float | None]  # path or URL of a video; start and end in seconds, as of a Record


@dataclass(frozen=True)
class Look:
    """How much is shown.

    Attributes:
        frames: of a clip, at most.
        size: pixels of their longer side, at most; smaller pictures stay as they are.
        seconds: from the clip's start; None: all of it.
    """

    frames: int
    size: int
    seconds: float | None


@contextmanager
def read_glimpses(
    clips: Mapping[Name, Segment], look: Look, workers: int, timeout: float, failed: dict[Name, VideoError]
) -> Iterator[Iterator[tuple[Name, np.ndarray]]]:
    """The frames of clips, uint8 RGB [F, H, W, 3] each, in order; those that cannot be read go to `failed` instead.

    Args:
        workers: decoding processes; as many clips wait decoded.
        timeout: seconds that a decoder may take for a clip.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="glimpses") as threads, DecodePool(workers, timeout) as pool:
        yield _in_order(clips, look, threads, pool, 2 * workers, failed)


def _in_order(
    clips: Mapping[Name, Segment],
    look: Look,
    threads: ThreadPoolExecutor,
    pool: DecodePool,
    ahead: int,
    failed: dict[Name, VideoError],
) -> Iterator[tuple[Name, np.ndarray]]:
    waiting: deque[tuple[Name, Future[np.ndarray]]] = deque()
    rest = iter(clips.items())
    while True:
        while len(waiting) < ahead and (entry := next(rest, None)):
            waiting.append((entry[0], threads.submit(_read, pool, entry[1], look)))
        if not waiting:
            return
        name, future = waiting.popleft()
        try:
            yield name, future.result()
        except VideoError as error:
            failed[name] = error


def _read(pool: DecodePool, clip: Segment, look: Look) -> np.ndarray:
    path, start_s, end_s = clip
    probe = pool.probe(path).result()
    if look.seconds is not None:
        end_s = min(math.inf if end_s is None else end_s, (start_s or 0.0) + look.seconds)
    indices = spread_frames(probe.times, look.frames, start_s, end_s)
    scale = min(1.0, look.size / max(probe.height, probe.width))
    height, width = max(1, round(probe.height * scale)), max(1, round(probe.width * scale))
    placement = Placement(height, width, 0, 0, height, width)
    return pool.read(path, probe, indices, placement, preview=False).result().frames
