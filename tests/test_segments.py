"""Several clips of one video: where they lie, and that stage 1 takes exactly these frames for each."""

from __future__ import annotations

import io
import json
import math
import tarfile
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preprocess.config import PreprocessConfig
from preprocess.frames import split_segment
from preprocess.manifest import Record
from preprocess.plan import Rejected, plan_record
from preprocess.probe import Probe
from preprocess.sources import Source
from shared.errors import UserError
from shared.models import open_checkpoint
from tests.conftest import write_video
from tests.decoding import use_stand_ins
from tests.test_preprocess import preprocess

SIZE = ["--height", "32", "--width", "48", "--max_num_frames", "9"]
FPS, LENGTH = 8, 40  # of the video: 5 s
EXACT = 3e-6  # times are rounded to microseconds

lengths = st.floats(0.01, 100)
clip_lengths = st.floats(0.5, 50)


@given(lengths, st.sampled_from(["head", "chunk", "slide", "uniform"]), clip_lengths, clip_lengths)
def test_clips_lie_in_their_segment_and_have_one_length(length_s, mode, clip_s, stride_s):
    clips = split_segment(length_s, mode, clip_s, stride_s)
    assert clips
    assert all(end - start == pytest.approx(clip_s, abs=EXACT) for start, end in clips)
    assert min(start for start, _ in clips) >= 0
    if length_s >= clip_s:
        assert max(end for _, end in clips) <= length_s + EXACT
    else:
        assert clips == [(0.0, round(clip_s, 6))]


@given(lengths, clip_lengths)
def test_chunks_follow_each_other_until_no_other_fits(length_s, clip_s):
    starts = [start for start, _ in split_segment(length_s, "chunk", clip_s, 1.0)]
    assert starts == pytest.approx([number * clip_s for number in range(len(starts))], abs=EXACT)
    assert len(starts) == max(1, math.floor(length_s / clip_s + 1e-9))


@given(lengths, clip_lengths, clip_lengths)
def test_sliding_clips_start_every_stride_while_they_fit(length_s, clip_s, stride_s):
    starts = [start for start, _ in split_segment(length_s, "slide", clip_s, stride_s)]
    assert starts == pytest.approx([number * stride_s for number in range(len(starts))], abs=EXACT)
    assert len(starts) * stride_s + clip_s > length_s - EXACT


@given(lengths, clip_lengths)
def test_uniform_clips_are_as_many_as_chunks_from_the_very_start_to_the_very_end(length_s, clip_s):
    clips = split_segment(length_s, "uniform", clip_s, 1.0)
    assert len(clips) == len(split_segment(length_s, "chunk", clip_s, 1.0))
    (first, _), (_, last) = clips[0], clips[-1]
    if len(clips) > 1:
        assert first == 0
        assert last == pytest.approx(length_s, abs=EXACT)
        apart = np.diff([start for start, _ in clips])
        assert apart.min() >= clip_s - EXACT, "they do not overlap"
        assert np.ptp(apart) <= EXACT
    elif length_s > clip_s:
        assert first == pytest.approx(length_s - last, abs=EXACT), "one lies in the middle"


@given(lengths, clip_lengths)
def test_head_is_one_clip_at_the_start(length_s, clip_s):
    assert split_segment(length_s, "head", clip_s, 1.0) == [(0.0, round(clip_s, 6))]


def numbered_frames(count, height=48, width=72):
    """Frames whose brightness is six times their number."""
    return np.repeat(np.arange(count, dtype=np.uint8) * 6, height * width * 3).reshape(count, height, width, 3)


@pytest.fixture
def video(tmp_path, monkeypatch):
    use_stand_ins(monkeypatch)
    (tmp_path / "clips").mkdir()
    return write_video(tmp_path / "clips" / "long.mp4", numbered_frames(LENGTH), FPS)


def run(video, model, *flags, rows=({},), **options):
    lines = [json.dumps({"video": video.name, "caption": "a grey ramp", **row}) for row in rows]
    (video.parent / "m.jsonl").write_text("\n".join(lines))
    cache = video.parent.parent / "cache"
    return preprocess(cache, model, video.parent / "m.jsonl", *flags, **{"size": SIZE, **options})


def firsts(opened):
    """The first frame of each clip; that they are nine in a row is checked on the way."""
    for row in opened.rows:
        first = row["frame_indices"][0]
        assert row["frame_indices"] == list(range(first, first + 9))
    return [row["frame_indices"][0] for row in opened.rows]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--clips", "head"], [0]),
        (["--clips", "head", "--clip_seconds", "2"], [0]),
        (["--clips", "chunk"], [0, 9, 18, 27]),
        (["--clips", "CHUNK", "--clip_seconds", "1.5"], [0, 12, 24]),
        (["--clips", "slide"], [0, 5, 9, 14, 18, 23, 27]),  # every 4.5 frames: the next frame is taken
        (["--clips", "slide", "--clip_stride", "2"], [0, 16]),
        (["--clips", "uniform"], [0, 11, 21, 31]),  # every 10 1/3 frames
        (["--clips", "uniform", "--clip_seconds", "3"], [8]),
    ],
)
def test_a_long_video_gives_these_clips(video, tiny_2b, flags, expected):
    opened = run(video, tiny_2b, *flags)
    assert firsts(opened) == expected
    assert opened.encoded == (len(expected), 2)
    assert {row["caption"] for row in opened.rows} == {"a grey ramp"}
    assert len({row["sample_id"] for row in opened.rows}) == len(expected)
    assert all(row["start_s"] is None or row["end_s"] <= LENGTH / FPS for row in opened.rows)


def test_what_is_encoded_are_the_frames_of_each_clip(video, tiny_2b):
    """The preview shows the grey of the first and the last frame."""
    opened = run(video, tiny_2b, "--clips", "chunk")
    storage, folder = opened.dataset.cache.storage, opened.dataset.store_folder("latent")
    for row in opened.rows:
        members = tar_members(storage.local(f"{folder}/{row['latent_part']}.tar"))
        strip = np.asarray(Image.open(io.BytesIO(members[f"{row['latent_key'].hex()}.preview.jpg"])))
        shown = [round(strip[8:24, place * 48 + 8 : place * 48 + 40].mean() / 6) for place in (0, 3)]
        assert shown == [row["frame_indices"][0], row["frame_indices"][-1]]


def tar_members(path):
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member))}


def test_sample_ids_do_not_hang_on_what_stands_beside_them(video, tiny_2b):
    chunks = {row["start_s"]: row["sample_id"] for row in run(video, tiny_2b, "--clips", "chunk").rows}
    slides = {row["start_s"]: row["sample_id"] for row in run(video, tiny_2b, "--clips", "slide").rows}
    assert chunks.items() <= slides.items()
    again = run(video, tiny_2b, "--clips", "chunk")
    assert [row["sample_id"] for row in again.rows] == list(chunks.values())
    assert again.encoded == (0, 0)


def test_segments_are_split_inside_their_bounds(video, tiny_2b):
    segments = [{"start": 1, "end": 3.5, "caption": "early"}, {"start": 3.5, "caption": "late"}]
    opened = run(video, tiny_2b, "--clips", "chunk", rows=segments)
    assert [(row["caption"], row["frame_indices"][0]) for row in opened.rows] == [
        ("early", 8), ("early", 17), ("late", 28),
    ]  # fmt: skip
    assert [(row["start_s"], row["end_s"]) for row in opened.rows] == [(1.0, 2.125), (2.125, 3.25), (3.5, 4.625)]
    for row in opened.rows:
        low, high = (8, 28) if row["caption"] == "early" else (28, 40)
        assert low <= min(row["frame_indices"]) <= max(row["frame_indices"]) < high


def test_a_segment_without_clips_is_taken_as_it_is(video, tiny_2b):
    opened = run(video, tiny_2b, rows=[{"start": 1, "end": 2.5}, {"start": 2.5, "end": 5}, {}])
    assert firsts(opened) == [8, 20, 0]
    assert [(row["start_s"], row["end_s"]) for row in opened.rows] == [(1.0, 2.5), (2.5, 5.0), (None, None)]


@pytest.mark.parametrize("mode", ["head", "chunk", "slide", "uniform"])
def test_a_video_shorter_than_a_clip_still_gives_one(video, tiny_2b, mode):
    opened = run(video, tiny_2b, "--clips", mode, "--clip_seconds", "60")
    assert firsts(opened) == [0]


@pytest.mark.parametrize("mode", ["head", "chunk", "slide", "uniform"])
@pytest.mark.parametrize("fps", ["auto", "source"])
def test_a_video_of_one_frame_is_too_short_whatever_is_made_of_it(video, tiny_2b, mode, fps):
    write_video(video.with_name("single.mp4"), numbered_frames(1))
    opened = run(video, tiny_2b, "--clips", mode, "--fps", fps, rows=[{}, {"video": "single.mp4"}])
    assert opened.report["rejected"] == {"too_short": 1}
    assert opened.rejected[0]["source"] == "single.mp4"


def test_a_frame_that_does_not_tell_how_long_it_lasts_is_rejected(tiny_2b):
    picture = Probe((0,), Fraction(1, 25), 0.0, "gif", 48, 72, Fraction(1), 0, False, True, False, 0)
    source = Source("/a.gif", 1, 1, "digest", picture)
    config = PreprocessConfig(pretrained_model_name_or_path=str(tiny_2b), fps="source", clips="chunk")
    record = Record("a.gif", "/a.gif", "a caption", None, None, 1.0, "m.jsonl:1")
    facts = open_checkpoint(str(tiny_2b), revision=None, variant=None, cache_dir=None, weights=()).facts
    (planned,) = plan_record(record, source, config, facts)
    assert isinstance(planned, Rejected)
    assert planned.reason == "too_short"


def test_a_segment_beyond_the_end_is_rejected_and_shifts_no_caption(video, tiny_2b):
    rows = [{"start": 60, "end": 70, "caption": "nothing"}, {"start": 1, "end": 3, "caption": "something"}]
    for flags in ([], ["--clips", "chunk"]):
        opened = run(video, tiny_2b, *flags, rows=rows)
        assert [row["caption"] for row in opened.rows] == ["something"]
        assert [(row["caption"], row["reason"]) for row in opened.rejected] == [("nothing", "too_short")]


def test_clips_of_which_none_is_long_enough_are_all_named(video, tiny_2b):
    with pytest.raises(UserError, match="all 10 clips were rejected"):
        run(video, tiny_2b, "--clips", "chunk", "--clip_seconds", "0.5")
