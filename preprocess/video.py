"""The pixels of the frames that are asked for, as the model is to see them.

Reads any container and codec that FFmpeg reads; writes nothing. Frames are counted as in `preprocess/probe.py`.

Shapes: F frames, H and W the height and width of a placement, h and w those of a picture before it is placed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from preprocess.frames import Placement
from preprocess.probe import Probe, decode_packet, open_video, video_stream
from shared.errors import VideoError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.filter import Graph
    from av.video.stream import VideoStream

# Part of every latent's key. Raise it when other pixels come out of `read_frames` for the same arguments: another
# decoder or conversion to RGB, rotation, pixel aspect, resizing; or when `probe` gives a visible frame another index.
PIXELS_VERSION: int = 1

DECORD_CODECS = ("vp8", "vp9", "av1")
DECORD_BATCH = 8  # full-size frames held at once


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
    without a word, where PyAV tells: so H.264 is PyAV's, at the same speed. Rotation it applies itself, but not flips.
    GIF was right, with nothing to gain.
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
        with open_video(path) as container:
            stream = video_stream(container)
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
    frames = (frame for packet in container.demux(stream) for frame in decode_packet(packet))
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
