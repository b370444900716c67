"""Videos: what a file holds, and the pixels of the frames that are asked for.

Reads any container and codec that FFmpeg reads; writes nothing. A frame's index counts the visible frames in the
order they are shown: hidden ones (cut off by an edit list, undecodable before the first keyframe) have none.

Shapes: F frames, H and W the height and width of a placement, h and w those of a picture before it is placed.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocess.frames import Placement
from shared.errors import VideoError

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.filter import Graph
    from av.video.stream import VideoStream

# Part of every latent's key. Raise it when other pixels come out of `read_frames` for the same arguments: another
# decoder or conversion to RGB, rotation, pixel aspect, resizing; or when `probe` gives a visible frame another index.
PIXELS_VERSION: int = 1

INDEXED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # where a seek lands on the keyframe it names
DECORD_CODECS = ("vp8", "vp9", "av1")
DECORD_BATCH = 8  # full-size frames held at once


@dataclass(frozen=True)
class Probe:
    """What is learnt of a video by reading its packets and decoding its first frame.

    Attributes:
        pts: when each visible frame is shown, in units of `time_base`, never decreasing.
        time_base: seconds.
        fps: visible frames a second on average; 0 when a single frame does not tell.
        codec: FFmpeg's name of it.
        coded_height, coded_width: pixels as they are stored.
        pixel_aspect: width of a stored pixel over its height.
        rotation: degrees clockwise to show it: 0, 90, 180 or 270.
        flipped: mirrored left to right before it is rotated.
        timed: decoded frames carry these `pts`; else they are known by their order alone.
        seekable: a frame can be reached from the keyframe before it, and every packet is a visible frame.
        delay: in units of `time_base`, the longest time from when a packet is decoded to when it is shown.
    """

    pts: tuple[int, ...]
    time_base: Fraction
    fps: float
    codec: str
    coded_height: int
    coded_width: int
    pixel_aspect: Fraction
    rotation: int
    flipped: bool
    timed: bool
    seekable: bool
    delay: int

    @property
    def times(self) -> np.ndarray:
        """When each visible frame is shown: float64 [frames], in seconds of the file's own clock."""
        return np.asarray(self.pts, np.float64) * self.time_base.numerator / self.time_base.denominator

    @property
    def height(self) -> int:
        """Pixels as it is shown: made square by stretching, never by squeezing, and then rotated."""
        return self._square_size[self.rotation in (90, 270)]

    @property
    def width(self) -> int:
        return self._square_size[self.rotation in (0, 180)]

    @property
    def _square_size(self) -> tuple[int, int]:
        height = round(self.coded_height / min(self.pixel_aspect, Fraction(1)))
        return height, round(self.coded_width * max(self.pixel_aspect, Fraction(1)))

    def to_dict(self) -> dict[str, Any]:
        """The same in types that JSON knows; exact."""
        fractions = {name: list(getattr(self, name).as_integer_ratio()) for name in ("time_base", "pixel_aspect")}
        return {**vars(self), "pts": list(self.pts), **fractions}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Probe:
        fractions = {name: Fraction(*facts[name]) for name in ("time_base", "pixel_aspect")}
        return cls(**{**facts, "pts": tuple(facts["pts"]), **fractions})


def probe(path: str) -> Probe:
    """What is learnt of a video by reading its packets and decoding its first frame.

    Raises:
        VideoError: `unreadable` or `no_video_stream`.
    """
    import av

    try:
        with _open(path) as container:
            return _probe(container, _video_stream(container))
    except av.FFmpegError as error:
        raise VideoError("unreadable", f"{error.strerror}") from error


def _open(path: str) -> InputContainer:
    import av

    # an absolute path is never taken for a protocol, and a playlist named .mp4 does not reach the network
    return av.open(Path(path).absolute(), options={"protocol_whitelist": "file"})


def _video_stream(container: InputContainer) -> VideoStream:
    """The stream that players (and decord) take; a cover picture is none."""
    from av.stream import Disposition
    from av.video.stream import VideoStream

    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise VideoError("no_video_stream", f"none of its {len(container.streams)} streams is video")
    stream.codec_context.thread_count = 1  # the other cores have children of their own
    return stream


def _probe(container: InputContainer, stream: VideoStream) -> Probe:
    name = container.format.name
    first: VideoFrame | None = None
    stamps: list[int | None] = []
    keyframe_pts: int | None = None
    is_seekable = name in INDEXED_CONTAINERS
    delay = 0
    for packet in container.demux(stream):
        first = first or next(iter(_decode(packet)), None)
        if not packet.size:
            continue
        if packet.is_discard or packet.is_corrupt:
            is_seekable = False
            continue
        stamps.append(packet.pts)
        if packet.pts is not None and packet.dts is not None:
            delay = max(delay, packet.pts - packet.dts)
        if packet.is_keyframe:
            keyframe_pts = packet.pts
            is_seekable = is_seekable and _is_fresh_start(packet, stream)
        elif keyframe_pts is None or packet.pts is None or packet.pts < keyframe_pts:  # an open group of pictures
            is_seekable = False
    if first is None:
        raise VideoError("unreadable", f"none of its {len(stamps)} frames can be decoded")

    pts = sorted(stamp for stamp in stamps if stamp is not None)
    time_base = stream.time_base or Fraction(1)
    is_timed = name != "avi" and len(pts) == len(stamps)  # AVI stores none: FFmpeg makes them up
    if is_timed and first.pts in pts:
        shown = pts[pts.index(first.pts) :]  # what is before cannot be decoded: no keyframe yet
        is_seekable = is_seekable and len(shown) == len(pts)
    else:
        time_base = 1 / (stream.guessed_rate or stream.average_rate or Fraction(25))
        shown, is_timed, is_seekable = list(range(len(stamps))), False, False
    seconds = (shown[-1] - shown[0]) * time_base  # more to rely on than the container's rate: GIF's is 25 for 24
    rotation, flipped = _orientation(first)
    return Probe(
        pts=tuple(shown),
        time_base=time_base,
        fps=float((len(shown) - 1) / seconds if seconds else stream.average_rate or 0),
        codec=stream.codec.canonical_name,
        coded_height=first.height,
        coded_width=first.width,
        pixel_aspect=stream.sample_aspect_ratio or Fraction(1),
        rotation=rotation,
        flipped=flipped,
        timed=is_timed,
        seekable=is_seekable,
        delay=delay,
    )


def _decode(packet: Packet) -> list[VideoFrame]:
    """The frames that a packet completes: none for a torn packet, or one from before the first keyframe."""
    return [] if packet.is_corrupt else packet.decode()


def _is_fresh_start(keyframe: Packet, stream: VideoStream) -> bool:
    """Whether decoding can start here. Of H.264's keyframes only an IDR picture (unit type 5) promises that."""
    if stream.codec.canonical_name != "h264":
        return True
    header = stream.codec_context.extradata
    if not header or header[0] != 1:  # without the lengths that MP4 and Matroska put before each unit
        return False
    data, size_bytes, offset = bytes(keyframe), (header[4] & 3) + 1, 0
    while offset + size_bytes < len(data):
        start = offset + size_bytes
        if data[start] & 31 == 5:
            return True
        offset = start + int.from_bytes(data[offset:start])
    return False


def _orientation(frame: VideoFrame) -> tuple[int, bool]:
    """How to show a frame: degrees clockwise (a multiple of 90), and whether to mirror it left to right before."""
    from av.sidedata.sidedata import SideData

    matrix = frame.side_data.get("DISPLAYMATRIX")
    if not isinstance(matrix, SideData):
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()  # x' = ax + cy, y' = bx + dy
    flipped = a * d - b * c < 0
    sign = -1 if flipped else 1
    return round(math.degrees(math.atan2(sign * b, sign * a)) / 90) % 4 * 90, flipped


def read_frames(path: str, probe: Probe, indices: Sequence[int], placement: Placement) -> np.ndarray:
    """The pixels of some visible frames: upright, with square pixels, placed, in RGB.

    Args:
        indices: of visible frames, in any order; they may repeat.

    Returns:
        uint8 [F, H, W, 3].

    Raises:
        VideoError: `unreadable` or `over_reports_frames`.
    """
    clip = np.empty((len(indices), placement.height, placement.width, 3), np.uint8)
    wanted = sorted(set(indices))
    for index, picture in zip(wanted, _pictures(path, probe, wanted), strict=True):
        clip[np.equal(indices, index)] = _place(_upright(picture, probe), placement)
    return clip


def _place(picture: np.ndarray, placement: Placement) -> np.ndarray:
    """A picture [h, w, 3] as its placement says, [H, W, 3]."""
    import torch
    from torch.nn.functional import interpolate

    batch = torch.from_numpy(np.ascontiguousarray(picture)[None]).permute(0, 3, 1, 2)  # channels last: twice as fast
    size = (placement.resized_height, placement.resized_width)
    resized = interpolate(batch, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    bottom, right = placement.top + placement.height, placement.left + placement.width
    cropped = resized[placement.top : bottom, placement.left : right]
    return cropped[:, ::-1] if placement.mirrored else cropped


def _upright(picture: np.ndarray, probe: Probe) -> np.ndarray:
    mirrored = picture[:, ::-1] if probe.flipped else picture
    return np.rot90(mirrored, -probe.rotation // 90)


def _uses_decord(probe: Probe) -> bool:
    """Whether decord decodes a video; PyAV does the others, to the same pixels where both can.

    decord counts packets and seeks to keyframes: it is right where each packet is one visible frame, and each keyframe
    a fresh start. Elsewhere decord2 3.4 gave other frames than those asked for, without an error: edit lists, open
    groups of pictures, H.264 with intra refresh, AVI, MPEG-TS, MPEG-PS. Ogg and raw H.264 it does not open. HEVC fails
    after the first closed group (avcodec_send_packet: -11), and most HEVC has open ones. Damaged H.264 it conceals
    without a word, where PyAV tells: so H.264 is PyAV's, at the same speed. Rotation it applies itself, but not flips. GIF was right, with nothing to gain.
    """
    return probe.seekable and probe.codec in DECORD_CODECS and probe.rotation == 0 and not probe.flipped


def _pictures(path: str, probe: Probe, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """The wanted frames (ascending, distinct) as coded, uint8 [h, w, 3] in RGB."""
    done = 0
    if _uses_decord(probe):
        from decord._ffi.base import DECORDError, DECORDLimitReachedError

        try:
            for picture in _decord_pictures(path, probe, wanted):
                yield picture
                done += 1
        except (DECORDError, DECORDLimitReachedError, RuntimeError):
            pass  # PyAV goes on from here: it can, or it says what is wrong
    yield from _pyav_pictures(path, probe, wanted[done:])


def _decord_pictures(path: str, probe: Probe, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(path, num_threads=1, fault_tol=1e-9)  # not one frame put in another's place
    if len(reader) == len(probe.pts):
        for start in range(0, len(wanted), DECORD_BATCH):
            yield from reader.get_batch(wanted[start : start + DECORD_BATCH]).asnumpy()


def _pyav_pictures(path: str, probe: Probe, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    import av

    if not wanted:
        return
    remaining = iter(wanted)
    index = next(remaining)
    filters: dict[tuple[int, int, str], Graph] = {}  # more than one where a stream changes its size or format
    is_damaged = False
    try:
        with _open(path) as container:
            stream = _video_stream(container)
            if probe.seekable:
                container.seek(probe.pts[index] - probe.delay, stream=stream)  # MP4 seeks by decoding time
            for position, frame in _visible(container, stream, probe):
                is_damaged = frame.is_corrupt or (is_damaged and not frame.key_frame)  # it spreads to the next keyframe
                if position > index:
                    break
                if position == index:
                    if is_damaged:
                        raise VideoError("unreadable", f"frame {index} is damaged")
                    kind = (frame.width, frame.height, frame.format.name)
                    if kind not in filters:
                        filters[kind] = _rgb_filter(frame, probe)
                    filters[kind].push(frame)
                    yield filters[kind].pull().to_ndarray()
                    index = next(remaining, -1)
                    if index < 0:
                        return
    except av.FFmpegError as error:
        raise VideoError("unreadable", f"frame {index} of {len(probe.pts)}: {error.strerror}") from error
    raise VideoError("over_reports_frames", f"frame {index} of {len(probe.pts)} is not there")


def _visible(container: InputContainer, stream: VideoStream, probe: Probe) -> Iterator[tuple[int, VideoFrame]]:
    """Decoded frames with their index, from where the container stands; those unknown to the probe are left out."""
    frames = (frame for packet in container.demux(stream) for frame in _decode(packet))
    if not probe.timed:
        yield from enumerate(frames)
        return
    position = 0
    for frame in frames:
        if frame.pts is not None:
            position = bisect_left(probe.pts, frame.pts, lo=position)
            if position < len(probe.pts) and probe.pts[position] == frame.pts:
                yield position, frame
                position += 1


def _rgb_filter(frame: VideoFrame, probe: Probe) -> Graph:
    """What turns frames like this one into RGB at the coded size, as decord does it: the same filter and defaults.

    It takes the range (full or not) and the matrix (BT.601, 709, 2020) from each frame; what is untagged is BT.601.
    """
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base)
    scale = graph.add("scale", f"{probe.coded_width}:{probe.coded_height}")
    graph.link_nodes(source, scale, graph.add("format", "rgb24"), graph.add("buffersink")).configure()
    return graph
