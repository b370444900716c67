"""Every kind of video that PyAV can write here, each picture telling its own number and which way up it is."""

import dataclasses
import json
import random
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image

from preprocess import video
from preprocess.frames import Placement, place
from preprocess.probe import Probe, probe
from preprocess.video import read_frames
from shared.errors import VideoError

HEIGHT, WIDTH, COUNT, FPS = 96, 128, 25, 24
COLOURS = {"R": (210, 40, 40), "G": (40, 180, 60), "B": (40, 60, 200), "Y": (220, 210, 50)}
BITS = 8
HIKER = Path(__file__).parents[2] / "shared/clips/hiker_tiny.mp4"

X264 = {"crf": "12", "x264-params": "keyint=8:bframes=3"}
X265 = {"crf": "12", "x265-params": "log-level=none:keyint=8:no-open-gop=1"}
KINDS = {  # name: codec, pixel format, file name, options
    "h264": ("libx264", "yuv420p", "a.mp4", X264),
    "h264 in Matroska": ("libx264", "yuv420p", "a.mkv", X264),
    "h264 in MPEG-TS": ("libx264", "yuv420p", "a.ts", X264),
    "h264 in AVI": ("libx264", "yuv420p", "a.avi", X264),
    "h264, no container": ("libx264", "yuv420p", "a.h264", X264),
    "h264, open groups": ("libx264", "yuv420p", "a.mp4", {"x264-params": "keyint=8:bframes=3:open-gop=1"}),
    "h264, intra refresh": ("libx264", "yuv420p", "a.mp4", {"x264-params": "keyint=8:bframes=0:intra-refresh=1"}),
    "h264 4:4:4": ("libx264", "yuv444p", "a.mp4", X264),
    "h264 grey": ("libx264", "gray", "a.mp4", X264),
    "h264 interlaced": ("libx264", "yuv420p", "a.mp4", {**X264, "flags": "+ilme+ildct"}),
    "hevc 10 bit": ("libx265", "yuv420p10le", "a.mp4", X265),
    "hevc, open groups": ("libx265", "yuv420p", "a.mp4", {"x265-params": "log-level=none:keyint=8"}),
    "av1": ("libsvtav1", "yuv420p", "a.mp4", {"preset": "10", "crf": "20", "g": "8"}),
    "vp8": ("libvpx", "yuv420p", "a.webm", {"g": "8", "b": "2M", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9": ("libvpx-vp9", "yuv420p", "a.webm", {"g": "8", "crf": "15", "lag-in-frames": "16"}),
    "prores": ("prores_ks", "yuv422p10le", "a.mov", {}),
    "gif": ("gif", "rgb8", "a.gif", {}),
    "mpeg2": ("mpeg2video", "yuv420p", "a.mkv", {"g": "8", "bf": "2", "q": "2"}),
    "mpeg4 in AVI": ("mpeg4", "yuv420p", "a.avi", {"g": "8", "bf": "2"}),
    "motion jpeg": ("mjpeg", "yuvj420p", "a.mov", {}),
}

PLAIN = ["h264", "h264 in Matroska", "h264 4:4:4", "h264 grey", "h264 interlaced", "av1", "vp8", "vp9"]


def draw(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Red, green, blue and yellow quarters, and across the middle the number's bits, black and white, highest first."""
    picture = np.empty((height, width, 3), np.uint8)
    for name, rows, columns in (("R", 0, 0), ("G", 0, 1), ("B", 1, 0), ("Y", 1, 1)):
        picture[rows * height // 2 :, columns * width // 2 :][: height // 2 + 1, : width // 2 + 1] = COLOURS[name]
    for bit in range(BITS):
        block = slice(width * bit // BITS, width * (bit + 1) // BITS)
        picture[height * 3 // 8 : height * 5 // 8, block] = 255 * (number >> (BITS - 1 - bit) & 1)
    return picture


def as_frame(picture: np.ndarray) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(picture, "rgb24")


def number_of(picture: np.ndarray) -> int:
    height, width, _ = picture.shape
    row = picture[height // 2, [int(width * (bit + 0.5) / BITS) for bit in range(BITS)]].mean(axis=-1)
    return sum(int(value > 127) << (BITS - 1 - bit) for bit, value in enumerate(row))


def corners_of(picture: np.ndarray) -> str:
    """The colours of the four quarters, as one reads."""
    height, width, _ = picture.shape
    points = [picture[y, x] for y in (height // 8, height * 7 // 8) for x in (width // 8, width * 7 // 8)]
    return "".join(min(COLOURS, key=lambda name: abs(point - np.array(COLOURS[name])).sum()) for point in points)


def write(path: Path, codec: str, pix_fmt: str, options: dict[str, str] | None = None, **settings: Any) -> str:
    """Encode a video; returns its path.

    Args:
        settings: `pictures`, by default the numbered ones; `ticks`, their times in units of 1/600 s; `rotation`,
            arguments of `set_display_rotation`; `muxer`, options of the container; all else goes to the codec context.
    """
    if not _encodes(codec):
        pytest.skip(f"this PyAV has no encoder {codec}")
    pictures = settings.pop("pictures", None) or [as_frame(draw(number)) for number in range(COUNT)]
    ticks, rotation = settings.pop("ticks", None), settings.pop("rotation", None)
    clock = Fraction(1, 600) if ticks else Fraction(1, FPS)
    with av.open(path, "w", options=settings.pop("muxer", {})) as container:
        stream: Any = container.add_stream(codec, FPS, options=options or {})
        stream.height, stream.width, stream.pix_fmt = pictures[0].height, pictures[0].width, pix_fmt
        stream.codec_context.time_base = clock
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if rotation:
            stream.set_display_rotation(*rotation)
        for number, picture in enumerate(pictures):
            frame = picture.reformat(format=pix_fmt)
            frame.pts, frame.time_base = ticks[number] if ticks else number, clock
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def _encodes(codec: str) -> bool:
    try:
        return av.Codec(codec, "w").is_encoder
    except av.codec.codec.UnknownCodecError:
        return False


def write_kind(kind: str, folder: Path, **settings) -> str:
    codec, pix_fmt, name, options = KINDS[kind]
    return write(folder / name, codec, pix_fmt, options, **settings)


def whole(facts: Probe) -> Placement:
    return place(facts.height, facts.width, facts.height, facts.width, "none", None)


def read_all(path: str) -> np.ndarray:
    facts = probe(path)
    return read_frames(path, facts, range(len(facts.pts)), whole(facts))


def numbers_of(pictures: np.ndarray) -> list[int]:
    return [number_of(picture) for picture in pictures]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_frames_in_order_at_their_times(kind, tmp_path):
    path = write_kind(kind, tmp_path)
    facts = probe(path)
    assert (facts.height, facts.width, facts.rotation) == (HEIGHT, WIDTH, 0)
    assert facts.fps == pytest.approx(FPS, rel=0.001)
    clock = 0.01 if kind == "gif" else 0.001  # the coarsest: GIF's and Matroska's
    assert facts.times - facts.times[0] == pytest.approx(np.arange(COUNT) / FPS, abs=clock)
    pictures = read_all(path)
    assert numbers_of(pictures) == list(range(COUNT))
    if kind != "h264 grey":
        assert {corners_of(picture) for picture in pictures} == {"RGBY"}
        tolerance = 51 if kind == "gif" else 12  # GIF here has 256 fixed colours
        assert abs(pictures[3, 10, 20] - np.array(COLOURS["R"])).max() < tolerance


@pytest.mark.parametrize("kind", KINDS)
def test_any_frames_in_any_order_are_those_of_a_full_read(kind, tmp_path):
    path = write_kind(kind, tmp_path)
    pictures, facts, rng = read_all(path), probe(path), random.Random(3)
    samples = [[index] for index in range(0, COUNT, 3)] + [[rng.randrange(COUNT) for _ in range(5)] for _ in range(2)]
    for indices in [*samples, list(range(2, COUNT, 7)), [20, 20, 3]]:
        assert np.array_equal(read_frames(path, facts, indices, whole(facts)), pictures[indices])


@pytest.mark.parametrize("kind", PLAIN)
def test_both_decoders_give_the_same_pixels(kind, tmp_path):
    path = write_kind(kind, tmp_path)
    facts = probe(path)
    for wanted in (range(COUNT), range(1, COUNT, 5), [COUNT - 1]):
        by_decord = np.stack(list(video._decord_pictures(path, facts, wanted)))
        assert np.array_equal(by_decord, np.stack(list(video._pyav_pictures(path, facts, wanted))))


def test_plain_files_go_to_decord_and_the_others_to_pyav(tmp_path):
    taken = [kind for kind in KINDS if video._uses_decord(probe(write_kind(kind, tmp_path)))]
    assert taken == [kind for kind in PLAIN if "h264" not in kind]  # what is damaged there, decord conceals


def test_probe_is_remembered_exactly(tmp_path):
    facts = probe(write_kind("h264 in Matroska", tmp_path, sample_aspect_ratio=Fraction(4, 3)))
    assert Probe.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


@pytest.mark.parametrize(("height", "width"), [(97, 129), (95, 128), (96, 127)])
@pytest.mark.parametrize("kind", ["vp9", "gif", "h264 4:4:4"])
def test_odd_sizes_keep_their_last_row_and_column(kind, height, width, tmp_path):
    pictures = read_all(
        write_kind(kind, tmp_path, pictures=[as_frame(draw(number, height, width)) for number in range(9)])
    )
    assert pictures.shape == (9, height, width, 3)
    assert numbers_of(pictures) == list(range(9))
    assert abs(pictures[:, -1, -1] - np.array(COLOURS["Y"])).max() < 51


@pytest.mark.parametrize(
    ("counterclockwise", "hflip", "corners"),
    [(90, False, "GYRB"), (180, False, "YBGR"), (-90, False, "BRYG"), (0, True, "GRYB"), (90, True, "YGBR")],
)
def test_rotation_metadata_is_applied(counterclockwise, hflip, corners, tmp_path):
    path = write_kind("h264", tmp_path, rotation=(counterclockwise, hflip))
    facts, pictures = probe(path), read_all(path)
    assert (facts.height, facts.width) == ((WIDTH, HEIGHT) if counterclockwise in (90, -90) else (HEIGHT, WIDTH))
    assert {corners_of(picture) for picture in pictures} == {corners}
    unflipped = pictures[:, :, ::-1] if hflip else pictures
    assert numbers_of(np.rot90(unflipped, -counterclockwise // 90, axes=(1, 2))) == list(range(COUNT))


def test_trimmed_mp4_gives_its_visible_frames(tmp_path):
    """As `ffmpeg -ss -c copy` does it: packets before the cut stay for the decoder, an edit list hides them."""
    source, trimmed, cut, keyframe = write_kind("h264", tmp_path), tmp_path / "trimmed.mp4", 11, 8
    with av.open(source) as reader, av.open(trimmed, "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(reader.streams.video[0]):
            if packet.pts is None or packet.dts is None or packet.pts * packet.time_base * FPS < keyframe:
                continue
            packet.pts -= round(cut / FPS / packet.time_base)
            packet.dts -= round(cut / FPS / packet.time_base)
            packet.stream = stream
            writer.mux(packet)
    facts, pictures = probe(str(trimmed)), read_all(str(trimmed))
    with av.open(trimmed) as reader:
        assert sum(packet.size > 0 for packet in reader.demux(video=0)) == COUNT - keyframe
    assert numbers_of(pictures) == list(range(cut, COUNT))
    assert facts.times == pytest.approx(np.arange(COUNT - cut) / FPS)


def test_stream_that_starts_inside_a_group_begins_at_its_first_keyframe(tmp_path):
    source = Path(write_kind("h264 in MPEG-TS", tmp_path))
    late = tmp_path / "late.ts"
    late.write_bytes(source.read_bytes()[188 * 20 :])
    facts, pictures = probe(str(late)), read_all(str(late))
    first = number_of(pictures[0])
    assert first in (8, 16)
    assert numbers_of(pictures) == list(range(first, COUNT))
    assert len(facts.times) == COUNT - first


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(2), (HEIGHT, 256)), (Fraction(1, 2), (192, WIDTH))])
def test_non_square_pixels_are_stretched(aspect, size, tmp_path):
    path = write_kind("h264", tmp_path, sample_aspect_ratio=aspect)
    facts, pictures = probe(path), read_all(path)
    assert (facts.height, facts.width) == size == pictures.shape[1:3]
    assert numbers_of(pictures) == list(range(COUNT))


def test_non_square_pixels_and_rotation_together(tmp_path):
    facts = probe(write_kind("h264", tmp_path, sample_aspect_ratio=Fraction(2), rotation=(90,)))
    assert (facts.height, facts.width) == (256, HEIGHT)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_variable_frame_rate_keeps_its_times(name, tmp_path):
    ticks = np.cumsum([0] + [25, 25, 50, 100] * 6)
    path = write(tmp_path / name, "libx264", "yuv420p", X264, ticks=ticks.tolist())
    assert probe(path).times == pytest.approx(ticks / 600, abs=0.0006)
    assert numbers_of(read_all(path)) == list(range(COUNT))


MATRICES = {"bt601": (6, 0.299, 0.114), "bt709": (1, 0.2126, 0.0722)}  # FFmpeg's number, weights of red and blue


def flat(rgb: tuple[int, int, int], matrix: str, is_full: bool) -> av.VideoFrame:
    """A frame of one colour, whose Y, Cb and Cr are worked out here."""
    number, red, blue = MATRICES[matrix]
    r, g, b = (value / 255 for value in rgb)
    y = red * r + (1 - red - blue) * g + blue * b
    cb, cr = (b - y) / 2 / (1 - blue), (r - y) / 2 / (1 - red)
    values = (255 * y, 128 + 255 * cb, 128 + 255 * cr) if is_full else (16 + 219 * y, 128 + 224 * cb, 128 + 224 * cr)
    frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p")
    for plane, value in zip(frame.planes, values, strict=True):
        plane.update(bytes([round(value)]) * plane.buffer_size)
    frame.colorspace, frame.color_range = number, 2 if is_full else 1
    return frame


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1"])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("is_full", [False, True])
def test_range_and_matrix_are_those_of_the_file(codec, matrix, is_full, tmp_path):
    options = {"libsvtav1": {"preset": "10"}, "libx265": {"x265-params": "log-level=none"}}.get(codec, {})
    tags = {"colorspace": MATRICES[matrix][0], "color_range": 2 if is_full else 1}
    for rgb in ((200, 60, 100), (12, 240, 30)):
        pictures = [flat(rgb, matrix, is_full)] * 3
        path = write(tmp_path / "a.mkv", codec, "yuv420p", {"crf": "4", **options}, pictures=pictures, **tags)
        assert abs(read_all(path) - np.array(rgb)).max() <= 4


def reference(path: str, placement: Placement) -> np.ndarray:
    """All frames decoded by PyAV alone, resized at once and cropped."""
    with av.open(path) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    size = (placement.resized_height, placement.resized_width)
    channels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(channels, size, mode="bicubic", antialias=True)
    bottom, right = placement.top + placement.height, placement.left + placement.width
    return resized.permute(0, 2, 3, 1).numpy()[:, placement.top : bottom, placement.left : right]


@pytest.mark.parametrize("target", [(48, 80), (64, 48), (192, 256), (96, 128)])
def test_resize_and_crop_equal_an_independent_interpolation(target, tmp_path):
    path = write_kind("h264", tmp_path)
    placement = place(HEIGHT, WIDTH, target[0], target[1], "random", random.Random(5))
    pictures = read_frames(path, probe(path), range(COUNT), placement)
    assert pictures.flags.c_contiguous
    assert np.array_equal(pictures, reference(path, placement))


def test_resize_agrees_with_pillow(tmp_path):
    path = write_kind("h264", tmp_path)
    pictures = read_frames(path, probe(path), [7], Placement(45, 61, 0, 0, 45, 61))
    whole_picture = Image.fromarray(read_all(path)[7])
    by_pillow = np.asarray(whole_picture.resize((61, 45), Image.Resampling.BICUBIC))
    assert abs(pictures[0].astype(int) - by_pillow).max() <= 1


def test_stretched_pixels_are_resampled_once(tmp_path):
    """From the coded size straight to the placement's: another resampling between would blur."""
    path = write_kind("h264", tmp_path, sample_aspect_ratio=Fraction(2))
    facts = probe(path)
    placement = place(facts.height, facts.width, 48, 96, "center", None)
    assert (placement.resized_height, placement.resized_width) == (48, 128)
    assert np.array_equal(read_frames(path, facts, range(COUNT), placement), reference(path, placement))


def test_mirrored_clip_is_the_plain_one_reversed(tmp_path):
    path = write_kind("h264", tmp_path)
    plain = Placement(96, 128, 8, 4, 64, 96)
    mirrored = read_frames(path, probe(path), [3, 4], dataclasses.replace(plain, mirrored=True))
    assert np.array_equal(mirrored, read_frames(path, probe(path), [3, 4], plain)[:, :, ::-1])
    assert mirrored.flags.c_contiguous


def test_real_clip_in_plain_h264():
    if not HIKER.exists():
        pytest.skip("the clips of ../shared are not here")
    facts = probe(str(HIKER))
    assert (len(facts.pts), facts.height, facts.width, facts.fps) == (49, 240, 368, 8.0)
    assert facts.times == pytest.approx(np.arange(49) / 8)
    placement = place(240, 368, 64, 96, "center", None)
    assert np.array_equal(read_frames(str(HIKER), facts, range(49), placement), reference(str(HIKER), placement))


def rejection(call, *args) -> str:
    with pytest.raises(VideoError) as caught:
        call(*args)
    return caught.value.reason


@pytest.mark.parametrize("content", [b"", b"no video at all", b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n"])
def test_what_is_no_video_is_unreadable(content, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    assert rejection(probe, str(path)) == "unreadable"


def test_missing_file_and_folder_are_unreadable(tmp_path):
    assert rejection(probe, str(tmp_path / "gone.mp4")) == "unreadable"
    assert rejection(probe, str(tmp_path)) == "unreadable"


def test_sound_alone_has_no_video_stream(tmp_path):
    path = tmp_path / "a.wav"
    with av.open(path, "w") as container:
        stream = container.add_stream("pcm_s16le", 8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    assert rejection(probe, str(path)) == "no_video_stream"


def test_torn_download_gives_the_frames_that_it_holds(tmp_path):
    path = Path(write_kind("h264", tmp_path, muxer={"movflags": "faststart"}))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    facts, pictures = probe(str(path)), read_all(str(path))
    assert 5 < len(facts.pts) < COUNT
    assert numbers_of(pictures) == [round(time * FPS) for time in facts.times]


def test_file_without_its_index_is_unreadable(tmp_path):
    path = Path(write_kind("h264", tmp_path))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert rejection(probe, str(path)) == "unreadable"


def damage(path: Path, number: int) -> None:
    """Overwrite most of a packet with zeros."""
    with av.open(path) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][number]
        position, size_bytes = packet.pos, packet.size
    assert position is not None
    content = bytearray(path.read_bytes())
    content[position + 6 : position + size_bytes] = bytes(size_bytes - 6)
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["h264", "hevc 10 bit", "hevc, open groups", "vp9", "av1", "mpeg2"])
def test_damaged_frames_are_refused_and_those_before_are_read(kind, tmp_path):
    path = write_kind(kind, tmp_path)
    damage(Path(path), 17)
    facts = probe(path)
    assert numbers_of(read_frames(path, facts, range(8), whole(facts))) == list(range(8))
    assert rejection(read_frames, path, facts, range(COUNT), whole(facts)) in ("unreadable", "over_reports_frames")


@pytest.mark.parametrize("kind", ["h264", "gif", "h264 in AVI"])
def test_frames_that_are_promised_but_not_there_are_reported(kind, tmp_path):
    path = write_kind(kind, tmp_path)
    facts = probe(path)
    more = dataclasses.replace(facts, pts=(*facts.pts, *(facts.pts[-1] + step for step in (1000, 2000))))
    assert rejection(read_frames, path, more, range(COUNT + 2), whole(facts)) == "over_reports_frames"


def test_probing_imports_no_torch(tmp_path):
    code = "import sys; from preprocess.probe import probe; probe(sys.argv[1]); assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, write_kind("h264", tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
