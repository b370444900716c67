"""What a video file holds: when each visible frame is shown, and how it is to be shown.

A frame's index counts the visible frames in the order they are shown: hidden ones (cut off by an edit list,
undecodable before the first keyframe) have none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import VideoError

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

INDEXED_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")  # where a seek lands on the keyframe it names


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
        """Pixels as it is shown, as `height`."""
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
        with open_video(path) as container:
            return _probe(container, video_stream(container))
    except av.FFmpegError as error:
        raise VideoError("unreadable", f"{error.strerror}") from error


def open_video(path: str) -> InputContainer:
    """An open video file; a URL or a playlist of URLs is never followed."""
    import av

    # an absolute path is never taken for a protocol, and a playlist named .mp4 does not reach the network
    return av.open(Path(path).absolute(), options={"protocol_whitelist": "file"})


def video_stream(container: InputContainer) -> VideoStream:
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
        first = first or next(iter(decode_packet(packet)), None)
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


def decode_packet(packet: Packet) -> list[VideoFrame]:
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
