"""Whether av and decord work here: a small clip is encoded, decoded, and its colours compared.

Each is imported in its own check: where one is missing or broken, the other one is looked at all the same.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.findings import Finding, import_status, reason_of
from shared.packages import install_command, read_packages

COLOURS = ((200, 30, 30), (30, 180, 30), (40, 40, 220))  # of the clip, a third of its width each
COLOUR_ERROR = 12  # of 255: what 4:2:0 and rounding may change
HEIGHT, WIDTH = 64, 384  # pixels; decord 3.4 cannot copy out VP9 that is 96 wide


def check_av() -> Iterator[Finding]:
    """PyAV writes a clip as stage 3 does, and reads it."""
    mend = install_command(read_packages(["av"]))
    try:
        import av
        import numpy as np
    except ImportError as error:
        yield Finding("av", import_status(error), reason_of(error), mend)
        return
    with tempfile.TemporaryDirectory(prefix="latentreel-doctor-") as folder:
        path = _write_clip(Path(folder), "libx264")
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    yield _judged("av", np.stack(frames), f"{av.__version__} writes H.264 and reads it", mend)


def check_decord() -> Iterator[Finding]:
    """decord reads a clip of a codec that stage 1 gives it."""
    mend = install_command(read_packages(["decord2"]))
    try:
        import decord
    except ImportError as error:
        yield Finding("decord", import_status(error), reason_of(error), mend)
        return
    try:
        with tempfile.TemporaryDirectory(prefix="latentreel-doctor-") as folder:
            frames = decord.VideoReader(str(_write_clip(Path(folder), "libvpx-vp9"))).get_batch([0, 1, 2]).asnumpy()
    except ImportError as error:
        yield Finding("decord", "wrong", f"is there; not tried, as av cannot write a clip ({reason_of(error)})", mend)
        return
    yield _judged("decord", frames, f"{decord.__version__} reads VP9", mend)


def _write_clip(folder: Path, codec: str) -> Path:
    import av
    import numpy as np

    path = folder / f"clip.{'mp4' if codec == 'libx264' else 'webm'}"
    picture = np.repeat(np.array(COLOURS, np.uint8), WIDTH // 3, axis=0)[None].repeat(HEIGHT, axis=0)  # [64, 384, 3]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


def _judged(name: str, frames: Any, told: str, mend: str) -> Finding:
    """Whether frames [3, H, W, 3] show the colours that were written."""
    if frames.shape != (3, HEIGHT, WIDTH, 3):
        return Finding(name, "wrong", f"{told}: {frames.shape} in place of 3 frames of {HEIGHT}x{WIDTH}", mend)
    third = WIDTH // 3
    seen = [frames[:, :, third * place + 32 : third * place + 96].mean((0, 1, 2)) for place in range(3)]
    worst = max(abs(a - b) for colour, got in zip(COLOURS, seen, strict=True) for a, b in zip(colour, got, strict=True))
    if worst > COLOUR_ERROR:
        return Finding(name, "wrong", f"{told}: colours are off by {worst:.0f} of 255", mend)
    return Finding(name, "ok", told)
