"""Frame choice, placement and bucket choice, against brute force and by hand."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.frames import Placement, choose_bucket, choose_frames, place, spread_frames
from shared.errors import VideoError
from shared.geometry import Bucket, largest_frame_count


def at_rate(count: int, fps: float, first: float = 0.0) -> np.ndarray:
    return first + np.arange(count) / fps


def reason_of(call, *args, **kwargs) -> str:
    with pytest.raises(VideoError) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def choose(times: np.ndarray, fps: float | None, **options) -> list[int]:
    return choose_frames(times, fps, **{"max_frames": 49, "min_frames": 9, **options})


def test_source_rate_takes_every_frame():
    assert choose(at_rate(40, 24.0), None) == list(range(37))


def test_source_at_the_rate_asked_for_gives_every_frame():
    assert choose(at_rate(49, 8.0), 8.0) == list(range(49))


@pytest.mark.parametrize(("source_fps", "fps"), [(29.97, 30.0), (30.0, 29.97), (23.976, 24.0), (24.0, 23.976)])
def test_nearly_equal_rates_neither_skip_nor_repeat(source_fps, fps):
    assert choose(at_rate(49, source_fps), fps) == list(range(49))


def test_milliseconds_of_matroska_neither_skip_nor_repeat():
    times = np.round(at_rate(49, 24.0), 3)
    assert choose(times, 24.0) == list(range(49))


def test_frames_are_the_nearest_to_the_times_asked_for():
    """25 fps at 8 fps: 0, 0.125, 0.25, 0.375 s are 3.125 source frames apart; 0.5 s lies between 12 and 13."""
    assert choose(at_rate(100, 25.0), 8.0, max_frames=9) == [0, 3, 6, 9, 12, 16, 19, 22, 25]


def test_first_time_is_that_of_the_first_frame():
    assert choose(at_rate(100, 25.0, first=7.3), 8.0) == choose(at_rate(100, 25.0), 8.0)


def test_variable_rate_is_sampled_by_time():
    times = np.concatenate([at_rate(10, 100.0), at_rate(20, 10.0, first=0.1)])
    assert choose(times, 10.0, max_frames=9) == [0, 10, 11, 12, 13, 14, 15, 16, 17]


def test_last_frame_stays_in_view_for_half_an_interval():
    """The last of ten frames at 10 fps is shown at 0.9 s: a 9th time of 0.94 s is inside, one of 0.96 s is not."""
    assert len(choose(at_rate(10, 10.0), 8 / 0.94, min_frames=1)) == 9
    assert len(choose(at_rate(10, 10.0), 8 / 0.96, min_frames=1)) == 5


def test_single_frame_is_a_clip_of_one():
    assert choose(np.array([3.0]), 8.0, min_frames=1) == [0]


def test_skipped_frames_are_counted_in_the_source():
    times = at_rate(60, 24.0)
    assert choose(times, None, skip_start=5, skip_end=10) == list(range(5, 50))
    assert choose(times, 8.0, skip_start=5) == [5 + 3 * k for k in range(17)]


def test_segment_begins_at_its_start_and_ends_before_its_end():
    times = at_rate(100, 25.0, first=0.08)
    assert choose(times, None, start_s=1.0, end_s=2.0) == list(range(25, 50))
    assert choose(times, None, start_s=1.0, end_s=2.0, skip_start=2, skip_end=1) == list(range(27, 48))


def test_segment_start_survives_a_clock_of_milliseconds():
    times = np.round(at_rate(60, 30.0), 3)
    assert choose(times, None, start_s=1 / 3)[0] == 10


@pytest.mark.parametrize(
    "options",
    [{}, {"skip_start": 100}, {"skip_start": 6, "skip_end": 6}, {"start_s": 99.0}, {"start_s": 0.3, "end_s": 0.1}],
)
def test_too_few_frames_are_refused(options):
    assert reason_of(choose, at_rate(8, 8.0), 8.0, **options) == "too_short"


def test_no_frames_at_all_are_refused():
    assert reason_of(choose, np.empty(0), 8.0, min_frames=0) == "too_short"


def test_up_to_a_quarter_of_repeats_is_allowed():
    assert len(choose(at_rate(60, 12.0), 15.0)) == 49
    assert reason_of(choose, at_rate(60, 10.0), 15.0) == "low_frame_rate"


stamps = st.lists(st.integers(0, 5000), min_size=1, max_size=80).map(sorted).map(lambda ticks: np.array(ticks) / 1000)
steady = st.builds(
    lambda count, fps, jitter: np.sort(at_rate(count, fps) + np.resize(jitter, count) / fps),
    st.integers(1, 120),
    st.floats(5, 60),
    st.lists(st.floats(-0.4, 0.4), min_size=1, max_size=10),
)


@given(stamps | steady, st.floats(1, 60), st.integers(1, 60), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_choice_is_ordered_nearest_and_4k_plus_1_whatever_the_timestamps(times, fps, max_frames, skip, skip_end):
    usable = times[skip : max(skip, len(times) - skip_end)]
    options = {"max_frames": max_frames, "min_frames": 1, "skip_start": skip, "skip_end": skip_end}
    if len(usable) == 0:
        assert reason_of(choose, times, fps, **options) == "too_short"
        return
    try:
        indices = choose(times, fps, **options)
    except VideoError:
        assert reason_of(choose, times, fps, **options) == "low_frame_rate"
        return
    half = np.median(np.diff(usable)) / 2 if len(usable) > 1 else 0.0
    inside = [k for k in range(max_frames) if usable[0] + k / fps <= usable[-1] + half + 1e-8]
    assert len(indices) == largest_frame_count(len(indices))
    assert len(inside) - 4 <= len(indices) <= len(inside)
    assert all(skip <= index < len(times) - skip_end for index in indices)
    assert indices == sorted(indices)
    assert sum(index == after for index, after in pairwise(indices)) <= len(indices) / 4
    for k, index in enumerate(indices):
        wanted = usable[0] + k / fps
        assert abs(times[index] - wanted) <= np.abs(usable - wanted).min() + 1e-8


@given(st.integers(0, 200), st.integers(0, 40), st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_source_rate_is_a_run_of_frames(count, skip, max_frames):
    try:
        indices = choose(at_rate(count, 24.0), None, max_frames=max_frames, min_frames=1, skip_start=skip)
    except VideoError:
        assert count <= skip
        return
    assert indices == list(range(skip, skip + largest_frame_count(min(count - skip, max_frames))))


def test_wide_source_covers_the_target_and_is_cropped_at_its_sides():
    assert place(720, 1280, 480, 720, "center", None) == Placement(480, 853, 0, 66, 480, 720)


def test_tall_source_is_cropped_above_and_below():
    assert place(1280, 720, 480, 720, "center", None) == Placement(1280, 720, 400, 0, 480, 720)


def test_source_of_the_targets_size_is_left_alone():
    assert place(480, 720, 480, 720, "center", None) == Placement(480, 720, 0, 0, 480, 720)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_placement_always_covers_its_box(source_height, source_width, height, width, seed):
    height, width = height * 16, width * 16
    centred = place(source_height, source_width, height, width, "center", None)
    for box in (centred, place(source_height, source_width, height, width, "random", random.Random(seed))):
        assert (box.height, box.width) == (height, width)
        assert box.resized_height == height or box.resized_width == width
        assert 0 <= box.top <= box.resized_height - height
        assert 0 <= box.left <= box.resized_width - width


def test_random_crop_is_a_function_of_its_generator_and_reaches_both_edges():
    lefts = [place(480, 1000, 480, 720, "random", random.Random(seed)).left for seed in range(3000)]
    assert lefts == [place(480, 1000, 480, 720, "random", random.Random(seed)).left for seed in range(3000)]
    assert (min(lefts), max(lefts)) == (0, 280)


def test_mode_none_stretches_up_to_one_percent():
    assert place(484, 720, 480, 720, "none", None) == Placement(480, 720, 0, 0, 480, 720)
    assert reason_of(place, 486, 720, 480, 720, "none", None) == "aspect_differs"
    assert reason_of(place, 720, 480, 480, 720, "none", None) == "aspect_differs"


BUCKETS = [Bucket(49, 480, 720), Bucket(25, 480, 720), Bucket(25, 240, 368), Bucket(49, 720, 480), Bucket(9, 240, 368)]


def test_bucket_of_the_nearest_aspect_with_the_most_frames():
    assert choose_bucket(BUCKETS, 1920, 1080, 300) == Bucket(49, 720, 480)
    assert choose_bucket(BUCKETS, 1000, 1500, 300) == Bucket(49, 480, 720)
    assert choose_bucket(BUCKETS, 1000, 1500, 48) == Bucket(25, 480, 720)
    assert choose_bucket(BUCKETS, 1080, 1920, 300) == Bucket(25, 240, 368)


def test_larger_area_wins_a_tie_of_frames():
    assert choose_bucket([Bucket(9, 64, 96), Bucket(9, 128, 192)], 480, 720, 9) == Bucket(9, 128, 192)


def test_square_clip_between_two_aspects_does_not_hang_on_their_order():
    pair = [Bucket(9, 64, 96), Bucket(9, 96, 64)]
    assert choose_bucket(pair, 100, 100, 9) == choose_bucket(pair[::-1], 100, 100, 9)


def test_clip_too_short_for_its_aspect_is_not_bent_into_another():
    assert reason_of(choose_bucket, [Bucket(49, 480, 720), Bucket(9, 720, 480)], 1080, 1620, 25) == "too_short"


# --- frames spread over a segment


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 24, 40])
@pytest.mark.parametrize("segment", [(None, None), (0.5, None), (None, 2.0), (1.0, 2.0)])
@pytest.mark.parametrize("jitter", [0.0, 0.02])
def test_spread_frames_are_those_in_view_at_the_middles_of_equal_spans(count, segment, jitter):
    rng = np.random.default_rng(count)
    times = 5.0 + np.arange(24) / 8 + jitter * rng.random(24)
    since = [float(time - times[0]) for time in times]
    start, end = (0.0 if segment[0] is None else segment[0]), (np.inf if segment[1] is None else segment[1])
    inside = [index for index, time in enumerate(since) if start - 1e-3 <= time < end - 1e-3]
    interval = float(np.median(np.diff(since)))
    length = since[inside[-1]] - since[inside[0]] + interval
    expected = set()
    for number in range(count):
        middle = since[inside[0]] + (number + 0.5) * length / count
        expected.add(max(index for index in inside if since[index] <= middle + 1e-9))
    assert spread_frames(times, count, *segment) == sorted(expected)


def test_spread_frames_of_one_frame_and_of_none():
    assert spread_frames(np.array([3.0]), 8, None, None) == [0]
    with pytest.raises(VideoError, match=r"too_short: none of its 24 frames is shown from 9 s to the end"):
        spread_frames(np.arange(24) / 8, 8, 9.0, None)
