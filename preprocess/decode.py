"""Decoding in child processes that can be killed: a native decoder may hang with the GIL held, or abort.

The parent writes a request to a child's stdin, the child answers on its stdout. A message is its length (4 bytes,
big-endian) and JSON; the frames of a clip and its preview follow as bare bytes:

    parent  {"task": "probe", "path": ...}, or {"task": "read", ...} with the arguments of `DecodePool.read`
    child   {"ready": true}, its imports done: from here on the time limit counts; then one of
            {"probe": ...}
            {"preview_bytes": n}, frames, preview
            {"reason": ..., "detail": ...}, a VideoError

Shapes: F frames, H and W height and width in pixels.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import LifoQueue
from typing import Any, BinaryIO

import numpy as np

from preprocess import files
from preprocess.copies import GivenUpError
from preprocess.frames import Placement
from preprocess.probe import Probe, probe
from preprocess.video import read_frames
from shared.errors import VideoError
from shared.processes import die_with_parent, ignore_stop_signals

STARTUP_S = 300.0  # for a child's imports: torch takes seconds, from a cold network disk minutes
PIPE_BYTES = 1 << 20  # Linux's own 64 KiB make the two processes take turns 16 times as often
FETCHES = 4  # videos behind URLs that are fetched while all children are at work
PREVIEW_FRAMES = 4
PREVIEW_HEIGHT = 96  # pixels, at most


@dataclass(frozen=True)
class Clip:
    """What the model will see of a video.

    Attributes:
        frames: uint8 [F, H, W, 3] in RGB.
        preview: JPEG, a strip of frames from the first to the last; None when not asked for.
    """

    frames: np.ndarray
    preview: bytes | None


class DecodePool:
    """Children that probe and read videos: each is started when first needed, and replaced when it fails.

    A future fails with the VideoError that its child met, or with `timed_out` or `decoder_crashed`. A video behind a
    URL is fetched first, beside its time limit; a future that cannot have it fails with a FetchError. Leaving the
    context kills the children, cancels what is not done and removes the copies.

    Args:
        workers: children at most.
        timeout: seconds that a task may take.
        command: what to run as a child in place of this module, for tests; it is given no time to start.
    """

    def __init__(self, workers: int, timeout: float, command: list[str] | None = None) -> None:
        self._timeout = timeout
        self._command = command
        self._threads = ThreadPoolExecutor(workers + FETCHES, thread_name_prefix="decode")
        self._idle: LifoQueue[_Child | None] = LifoQueue()  # warm children first; None is one yet to be started
        for _ in range(workers):
            self._idle.put(None)
        self._children: set[_Child] = set()
        self._is_closed = False
        self._lock = threading.Lock()  # held over the two above

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the children at once. Tasks that are not done are cancelled."""
        with self._lock:
            self._is_closed = True
            for child in self._children:
                child.kill()
        files.forget_copies()  # so that nobody waits for a slow network
        self._threads.shutdown(cancel_futures=True)
        files.forget_copies()
        for child in self._children:
            child.end()

    def probe(self, path: str) -> Future[Probe]:
        """What is learnt of a video by reading its packets."""
        return self._threads.submit(self._probe, path)

    def read(
        self, path: str, probe: Probe, indices: Sequence[int], placement: Placement, preview: bool
    ) -> Future[Clip]:
        """The visible frames `indices` of a video, placed, and their preview where it is asked for."""
        return self._threads.submit(self._read, path, probe, indices, placement, preview)

    def _probe(self, path: str) -> Probe:
        with self._local(path) as file:
            answer, _ = self._ask({"task": "probe", "path": file})
        return Probe.from_dict(answer["probe"])

    def _read(self, path: str, probe: Probe, indices: Sequence[int], placement: Placement, preview: bool) -> Clip:
        facts = {"probe": probe.to_dict(), "placement": asdict(placement)}
        request = {"task": "read", "indices": list(indices), "preview": preview, **facts}
        frames = np.empty((len(indices), placement.height, placement.width, 3), np.uint8)
        with self._local(path) as file:
            _, jpeg = self._ask({**request, "path": file}, frames)
        return Clip(frames, jpeg or None)

    @contextmanager
    def _local(self, path: str) -> Iterator[str]:
        if self._is_closed:  # it would be fetched for nothing
            raise CancelledError
        try:
            with files.local(path) as file:
                yield file
        except GivenUpError:
            raise CancelledError from None

    def _ask(self, request: dict[str, Any], frames: np.ndarray | None = None) -> tuple[dict[str, Any], bytes]:
        """A child's answer and what follows it; frames are written to `frames`."""
        child = self._idle.get()
        try:
            while True:
                is_new = child is None
                child = child or self._start()
                try:
                    return child.ask(request, frames, self._timeout)
                except (TimeoutError, EOFError, BrokenPipeError) as error:
                    failed, child = child, None
                    verdict = self._verdict(failed, error)
                    if is_new or failed.is_ready:
                        raise verdict from error  # else it died since its last task: this one goes to a new child
        finally:
            self._idle.put(child)

    def _verdict(self, failed: _Child, error: Exception) -> Exception:
        """What to say of a task whose child hangs or is gone; ends that child."""
        if isinstance(error, TimeoutError):
            failed.kill()
        with self._lock:
            self._children.discard(failed)
        status = failed.end()
        if self._is_closed:
            return CancelledError()
        if not failed.is_ready:  # that is no verdict on the video
            return RuntimeError(f"a decoder could not start ({status}); stderr may tell why")
        if isinstance(error, TimeoutError):
            return VideoError("timed_out", f"not done in {self._timeout:g} s")
        return VideoError("decoder_crashed", f"its decoder ended with {status}")

    def _start(self) -> _Child:
        with self._lock:
            if self._is_closed:
                raise CancelledError
            child = _Child(self._command)
            self._children.add(child)
            return child


class _Child:
    """The parent's end of one child process.

    Attributes:
        is_ready: its imports for the task are done.
    """

    def __init__(self, command: list[str] | None) -> None:
        self._process = subprocess.Popen(
            command or [sys.executable, "-m", "preprocess.decode"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            pipesize=PIPE_BYTES,
            cwd=Path(__file__).resolve().parents[1],  # `-m` finds the stages in the checkout
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._requests, False)  # a child that hangs reads nothing
        self._is_substitute = command is not None
        self.is_ready = self._is_substitute

    def ask(self, request: dict[str, Any], frames: np.ndarray | None, timeout: float) -> tuple[dict[str, Any], bytes]:
        """The answer to a request and the bytes after it.

        Raises:
            TimeoutError, EOFError, BrokenPipeError: the child hangs or is gone.
            VideoError: that the child met.
        """
        self.is_ready = self._is_substitute
        deadline = time.monotonic() + (timeout if self.is_ready else STARTUP_S)
        self._send(_message(request), deadline)
        answer = self._receive(deadline)
        if "ready" in answer:
            self.is_ready = True
            deadline = time.monotonic() + timeout
            answer = self._receive(deadline)
        if "reason" in answer:
            raise VideoError(answer["reason"], answer["detail"])
        if frames is not None:
            self._fill(frames.data.cast("B"), deadline)
        return answer, self._bytes(answer.get("preview_bytes", 0), deadline)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> str:
        """Kill it if it still runs, free what it held, and tell how it ended."""
        with self._process as process:
            try:
                status = process.wait(timeout=1)  # it may be dying already: then its own status tells more
            except subprocess.TimeoutExpired:
                process.kill()
                status = process.wait()
        return signal.Signals(-status).name if status < 0 else f"exit status {status}"

    def _send(self, message: bytes, deadline: float) -> None:
        rest = memoryview(message)
        while rest:
            _await(self._requests, select.POLLOUT, deadline)
            rest = rest[os.write(self._requests, rest) :]

    def _receive(self, deadline: float) -> dict[str, Any]:
        size_bytes = int.from_bytes(self._bytes(4, deadline))
        return json.loads(self._bytes(size_bytes, deadline))

    def _bytes(self, size_bytes: int, deadline: float) -> bytes:
        data = bytearray(size_bytes)
        self._fill(memoryview(data), deadline)
        return bytes(data)

    def _fill(self, rest: memoryview, deadline: float) -> None:
        while rest:
            _await(self._answers, select.POLLIN, deadline)
            count = os.readv(self._answers, [rest])
            if not count:
                raise EOFError
            rest = rest[count:]


def _await(file: int, event: int, deadline: float) -> None:
    """Return when a pipe can be read from or written to, or is broken.

    Raises:
        TimeoutError: neither by `deadline`, of `time.monotonic()`.
    """
    poll = select.poll()
    poll.register(file, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _message(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode()
    return len(text).to_bytes(4) + text


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The child's life: answer requests until there are no more."""
    while head := requests.read(4):
        request = json.loads(requests.read(int.from_bytes(head)))
        _import_libraries(request["task"])
        answers.write(_message({"ready": True}))
        answers.flush()
        try:
            answer, follows = _answer(request)
        except VideoError as error:
            answer, follows = {"reason": error.reason, "detail": error.detail}, []
        except Exception as error:  # whatever a strange file brings about is that file's verdict, and told on stderr
            traceback.print_exc()
            answer, follows = {"reason": "decoder_crashed", "detail": repr(error)}, []
        answers.writelines([_message(answer), *follows])
        answers.flush()


def _import_libraries(task: str) -> None:
    """Import what a task needs, so that the time limit and the verdict are about the video alone."""
    import av  # noqa: F401

    if task == "read":
        import decord  # noqa: F401
        import torch

        torch.set_num_threads(1)  # the other cores have children of their own


def _answer(request: dict[str, Any]) -> tuple[dict[str, Any], list[Any]]:
    """The answer to a request, and what is to follow it."""
    if request["task"] == "probe":
        return {"probe": probe(request["path"]).to_dict()}, []
    placement = Placement(**request["placement"])
    frames = read_frames(request["path"], Probe.from_dict(request["probe"]), request["indices"], placement)
    preview = make_preview(frames) if request["preview"] else b""
    return {"preview_bytes": len(preview)}, [frames, preview]


def make_preview(frames: np.ndarray) -> bytes:
    """A JPEG strip of evenly spaced frames of a clip, uint8 [F, H, W, 3], side by side."""
    from PIL import Image

    count, height, width, _ = frames.shape
    shown_height = min(height, PREVIEW_HEIGHT)
    size = (max(1, round(width * shown_height / height)), shown_height)
    chosen = sorted({round(place) for place in np.linspace(0, count - 1, PREVIEW_FRAMES)})
    strip = Image.new("RGB", (size[0] * len(chosen), size[1]))
    for place, index in enumerate(chosen):
        strip.paste(Image.fromarray(frames[index]).resize(size, Image.Resampling.BICUBIC), (place * size[0], 0))
    file = io.BytesIO()
    strip.save(file, "JPEG", quality=85)
    return file.getvalue()


if __name__ == "__main__":
    ignore_stop_signals()
    die_with_parent()  # the parent's thread, that is: the pool's, which lives as long
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)  # what a native library prints goes to stderr, not into an answer
        serve(requests, answers)
