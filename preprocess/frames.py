"""Which frames and which pixels of a video make a clip. Arithmetic only: nothing is opened here.

Times are seconds, sizes and offsets pixels; indices count the visible frames in the order they are shown.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from shared.errors import VideoError
from shared.geometry import Bucket, largest_frame_count

ReshapeMode = Literal["center", "random", "none"]
ClipsMode = Literal["head", "uniform", "chunk", "slide"]

MAX_REPEATS = 0.25  # of the chosen frames; more is a source slower than the rate asked for
MAX_ASPECT_RATIO = Fraction(101, 100)  # "none" stretches: 1 % cannot be seen, more can
CLOCK_S = 1e-3  # Matroska and FLV round times to milliseconds: a segment takes the frame that it names
NOISE_S = 1e-9  # of float64 times; without it ties and the last frame would hang on a last digit


def choose_frames(
    times: np.ndarray,
    fps: float | None,
    *,
    skip_start: int = 0,
    skip_end: int = 0,
    max_frames: int,
    min_frames: int,
    start_s: float | None = None,
    end_s: float | None = None,
) -> list[int]:
    """Indices of the frames nearest in time to k/fps after the first usable one; they never decrease.

    A frame is usable when it is shown in the segment and is not among its `skip_start` first and `skip_end` last.
    The clip goes on to half a frame interval after the last usable frame, as that frame stays in view.

    Args:
        times: float64 [frames], seconds, never decreasing: when each visible frame is shown.
        fps: frames a second to take; None takes every frame.
        max_frames: the most to take.
        start_s: the segment's start, in seconds after the first visible frame.
        end_s: its end; a frame at that very time is no longer in it.

    Returns:
        4k + 1 indices, at least `min_frames`; a slow source repeats some.

    Raises:
        VideoError: `too_short` or `low_frame_rate`.
    """
    since = times - times[:1]
    first, last = _segment(since, start_s, end_s)
    first, last = first + skip_start, last - skip_end
    usable = since[first : max(first, last)]
    chosen = np.arange(len(usable)) if fps is None else _nearest(usable, fps, max_frames)
    chosen = chosen[: largest_frame_count(min(len(chosen), max_frames))]
    if len(chosen) < max(min_frames, 1):
        rate = "the source's own rate" if fps is None else f"{fps:g} fps"
        raise VideoError(
            "too_short", f"{len(usable)} usable frames of {len(times)} give {len(chosen)} at {rate}, need {min_frames}"
        )
    repeats = int(np.count_nonzero(np.diff(chosen) == 0))
    if repeats > MAX_REPEATS * len(chosen):
        raise VideoError("low_frame_rate", f"at {fps:g} fps {repeats} of {len(chosen)} frames would be repeats")
    return [int(index) for index in first + chosen]


def _segment(since: np.ndarray, start_s: float | None, end_s: float | None) -> tuple[int, int]:
    """The first frame that is shown in a segment, and the first after it, by their times since the first frame."""
    first = 0 if start_s is None else int(np.searchsorted(since, start_s - CLOCK_S))
    last = len(since) if end_s is None else int(np.searchsorted(since, end_s - CLOCK_S))
    return first, last


def spread_frames(times: np.ndarray, count: int, start_s: float | None, end_s: float | None) -> list[int]:
    """Indices of `count` frames spread evenly in time over a segment, for someone who is to tell what happens in it.

    The frame in view at the middle of each of `count` equal spans; the same frame is not taken twice, so a segment
    with fewer frames gives these. Arguments as `choose_frames`.

    Raises:
        VideoError: `too_short`, when no frame is shown in the segment.
    """
    since = times - times[:1]
    first, last = _segment(since, start_s, end_s)
    shown = since[first : max(first, last)]
    if len(shown) == 0:
        end = "the end" if end_s is None else f"{end_s:g} s"
        raise VideoError("too_short", f"none of its {len(times)} frames is shown from {start_s or 0:g} s to {end}")
    interval = float(np.median(np.diff(since))) if len(since) > 1 else 0.0
    length_s = float(shown[-1] - shown[0]) + interval
    middles = shown[0] + (np.arange(count) + 0.5) * length_s / count
    in_view = (np.searchsorted(shown, middles + NOISE_S, side="right") - 1).clip(min=0)
    return sorted({first + int(index) for index in in_view})


def _nearest(times: np.ndarray, fps: float, max_frames: int) -> np.ndarray:
    """Positions in `times` nearest to times[0] + k/fps, for k from 0 while that is inside; the earlier of two."""
    if len(times) == 0:
        return np.empty(0, np.int64)
    interval = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    length_s = float(times[-1] - times[0]) + interval / 2 + NOISE_S
    wanted = times[0] + np.arange(min(int(length_s * fps) + 1, max_frames)) / fps
    after = np.searchsorted(times, wanted).clip(max=len(times) - 1)
    before = (after - 1).clip(min=0)
    is_later = wanted - times[before] > times[after] - wanted + NOISE_S
    return np.where(is_later, after, before)


def split_segment(length_s: float, mode: ClipsMode, clip_s: float, stride_s: float) -> list[tuple[float, float]]:
    """The clips that one segment of a video gives: start and end of each, in seconds after the segment's start.

    A segment that is shorter than one clip is one clip; what `chunk` and `slide` leave at the end is not used.

    Args:
        mode: `head`, the first `clip_s` seconds; `chunk`, one after the other; `slide`, one every `stride_s` seconds;
            `uniform`, as many as `chunk` gives, spread evenly from start to end (one: in the middle).
    """
    spare_s = max(length_s - clip_s, 0.0)
    count, step_s, first_s = 1, 0.0, 0.0
    if mode == "slide":
        count, step_s = int(spare_s / stride_s + NOISE_S) + 1, stride_s
    elif mode != "head":
        count, step_s = max(int(length_s / clip_s + NOISE_S), 1), clip_s
    if mode == "uniform":
        step_s, first_s = (spare_s / (count - 1), 0.0) if count > 1 else (0.0, spare_s / 2)
    starts = (round(first_s + number * step_s, 6) for number in range(count))
    return [(start, round(start + clip_s, 6)) for start in starts]


@dataclass(frozen=True)
class Placement:
    """How a picture becomes a bucket's: resized, then cropped, then mirrored left to right when asked.

    Attributes:
        resized_height, resized_width: the whole picture after resizing.
        top, left, height, width: the box that is kept of it; height and width are the bucket's.
    """

    resized_height: int
    resized_width: int
    top: int
    left: int
    height: int
    width: int
    mirrored: bool = False


def place(
    source_height: int, source_width: int, height: int, width: int, mode: ReshapeMode, rng: random.Random | None
) -> Placement:
    """The smallest resize of the source that covers height x width, and the crop of it that `mode` asks for.

    Args:
        mode: `center`; `random`, uniform with `rng`; `none`, a resize to exactly height x width.

    Raises:
        VideoError: `aspect_differs`, for `none` when the aspects differ by more than 1 %.
    """
    if mode == "none":
        if _aspect_ratio(source_height, source_width, height, width) > MAX_ASPECT_RATIO:
            raise VideoError("aspect_differs", f"{source_height}x{source_width} against {height}x{width}")
        return Placement(height, width, 0, 0, height, width)
    scale = max(height / source_height, width / source_width)
    resized_height = max(height, round(source_height * scale))
    resized_width = max(width, round(source_width * scale))
    spare_height, spare_width = resized_height - height, resized_width - width
    if mode == "random":
        assert rng is not None, "a random crop needs its generator"
        top, left = rng.randint(0, spare_height), rng.randint(0, spare_width)
    else:
        top, left = spare_height // 2, spare_width // 2
    return Placement(resized_height, resized_width, top, left, height, width)


def choose_bucket(buckets: Sequence[Bucket], height: int, width: int, frames_available: int) -> Bucket:
    """The bucket for a clip: nearest in log aspect; among these the most frames it can fill, then the largest area.

    Args:
        frames_available: as `choose_frames` counts them.

    Raises:
        VideoError: `too_short`, when the clip fills none of that aspect.
    """
    distance = {bucket: _aspect_ratio(height, width, bucket.height, bucket.width) for bucket in buckets}
    nearest = [bucket for bucket in buckets if distance[bucket] == min(distance.values())]
    filled = [bucket for bucket in nearest if bucket.frames <= frames_available]
    if not filled:
        fewest = min(bucket.frames for bucket in nearest)
        raise VideoError("too_short", f"{frames_available} frames; the nearest bucket in aspect takes {fewest}")
    return max(filled, key=lambda bucket: (bucket.frames, bucket.height * bucket.width, bucket))


def _aspect_ratio(height: int, width: int, other_height: int, other_width: int) -> Fraction:
    """By what factor two aspects differ, at least 1. Exact: it orders as |log| does, and equal aspects are equal."""
    ratio = Fraction(height * other_width, width * other_height)
    return max(ratio, 1 / ratio)
