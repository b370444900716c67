"""Buckets and counts, against brute force and against what the VAE's arithmetic says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import ConfigError
from shared.geometry import Bucket, largest_frame_count, latent_frames

BUCKETS = st.builds(
    lambda k, rows, columns: Bucket(4 * k + 1, 16 * rows, 16 * columns),
    st.integers(0, 100),
    st.integers(1, 200),
    st.integers(1, 200),
)


@pytest.mark.parametrize("frames", range(-3, 60))
def test_largest_frame_count_is_the_largest_of_the_form(frames):
    fitting = [4 * k + 1 for k in range(20) if 4 * k + 1 <= frames]
    assert largest_frame_count(frames) == max(fitting, default=0)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (9, 3), (49, 13), (81, 21), (161, 41)])
def test_latent_frames_of_the_published_clips(frames, latents):
    assert latent_frames(frames) == latents


def test_latent_shape_of_the_native_clips():
    assert Bucket(49, 480, 720).latent_shape == (13, 60, 90)
    assert Bucket(81, 768, 1360).latent_shape == (21, 96, 170)


@given(BUCKETS)
def test_text_names_a_bucket(bucket):
    assert Bucket.parse(str(bucket)) == bucket
    assert Bucket.parse(f" {bucket}\n") == bucket
    assert str(bucket) == "x".join(str(side) for side in (bucket.frames, bucket.height, bucket.width))


@given(st.integers(-10, 300), st.integers(-40, 400), st.integers(-40, 400))
def test_a_bucket_is_what_the_models_take(frames, height, width):
    fits = frames > 0 and frames % 4 == 1 and all(side > 0 and side % 16 == 0 for side in (height, width))
    if fits:
        assert Bucket(frames, height, width).frames == frames
    else:
        with pytest.raises(ConfigError, match="use"):
            Bucket(frames, height, width)


def refusal(call, *values) -> str:
    """What is said of values that are refused; nothing of those that are taken."""
    try:
        call(*values)
    except ConfigError as error:
        return str(error)
    return ""


@given(st.integers(-10, 300), st.sampled_from(["frame count", "height", "width"]))
def test_a_refused_number_comes_with_the_two_nearest_that_are_taken(number, name):
    sizes = {"frame count": 9, "height": 16, "width": 16}
    said = refusal(Bucket, *(sizes | {name: number}).values())
    taken = [size for size in range(1, 400) if not refusal(Bucket, *(sizes | {name: size}).values())]
    if number in taken:
        assert said == ""
    else:
        below = max((size for size in taken if size < number), default=taken[0])
        above = taken[taken.index(below) + 1]
        assert said.startswith(f"{name} {number}: ")
        assert said.endswith(f"use {below} or {above}")


@given(st.text("0123456789x×-+. ٩\n", max_size=14))
def test_other_text_is_refused_in_one_line(text):
    said = refusal(Bucket.parse, text)
    assert len(said.splitlines()) <= 1
    if not said:
        bucket = Bucket.parse(text)
        assert [int(side) for side in text.split("x")] == [bucket.frames, bucket.height, bucket.width]


@pytest.mark.parametrize(
    "text",
    ["", "49x480", "49x480x720x3", "49×480×720", "49x480x-720", "49.0x480x720", "٤٩x480x720", "9" * 5000 + "x9x9"],
)
def test_what_is_not_three_plain_numbers_is_refused(text):
    with pytest.raises(ConfigError, match="FRAMESxHEIGHTxWIDTH"):
        Bucket.parse(text)


def test_buckets_are_ordered_by_frames_then_size():
    texts = ["25x480x720", "49x480x720", "49x720x480", "9x960x960"]
    assert [str(bucket) for bucket in sorted(map(Bucket.parse, texts))] == [texts[3], texts[0], texts[1], texts[2]]
