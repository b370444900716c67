"""Frames to an mp4 file that plays everywhere: H.264, 4:2:0, BT.709 in limited range, and tagged as that.

Shapes: F frames, H height, W width.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from shared.storage import fsync_folder

CRF = "17"  # of x264: no difference to be seen; 0 is lossless, 23 its default


def write_mp4(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    """Write a video, complete or not at all. Compare videos by their frames: x264 may code the same frames otherwise.

    Args:
        path: its final name.
        frames: uint8 [F, H, W, 3] in RGB; H and W even.
        fps: frames per second, exact.
    """
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

    temporary = path.with_name(f".{path.name}.tmp")
    settings = {"crf": CRF, "threads": "1"}  # with more threads, the bytes depend on their number
    try:
        # bitexact: no library versions in the file; faststart: a browser plays it before it has all of it
        with av.open(temporary, "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as file:
            stream = file.add_stream("libx264", rate=fps, options=settings)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            coding = stream.codec_context
            coding.colorspace, coding.color_range = Colorspace.ITU709, ColorRange.MPEG
            coding.color_primaries, coding.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            for place, pixels in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                    format="yuv420p",
                    src_color_range=ColorRange.JPEG,
                    dst_colorspace=Colorspace.ITU709,  # unsaid, FFmpeg takes BT.601, and greens and reds shift
                    dst_color_range=ColorRange.MPEG,
                    interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
                )
                frame.pts, frame.time_base = place, 1 / fps
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def read_mp4(path: Path) -> np.ndarray:
    """The frames of a video that `write_mp4` wrote, uint8 [F, H, W, 3] in RGB."""
    import av
    from av.video.reformatter import ColorRange, Colorspace, Interpolation

    with av.open(path) as file:
        return np.stack(
            [
                frame.reformat(
                    format="rgb24",
                    src_colorspace=Colorspace.ITU709,
                    src_color_range=ColorRange.MPEG,
                    dst_color_range=ColorRange.JPEG,
                    interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
                ).to_ndarray()
                for frame in file.decode(video=0)
            ]
        )
