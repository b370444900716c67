"""Decoding in children: what comes back, and what is left when a child hangs, crashes or loses its parent."""

import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path

import av
import numpy as np
import psutil  # type: ignore[import-untyped]
import pytest
from PIL import Image

from preprocess import decode
from preprocess.decode import DecodePool
from preprocess.frames import Placement, place
from preprocess.probe import probe
from preprocess.video import read_frames
from shared.errors import VideoError

CHECKOUT = Path(__file__).parents[1]
COUNT, HEIGHT, WIDTH = 20, 48, 64
PLACEMENT = place(HEIGHT, WIDTH, 32, 48, "center", None)

HANG = [sys.executable, "-c", "import time; time.sleep(600)"]
ABORT = [sys.executable, "-c", "import os; os.abort()"]
EXIT = [sys.executable, "-c", "import os; os._exit(7)"]
# The real child, but for files named after what befalls their decoder:
MISHAPS = """
import os, sys, time
from preprocess import decode

def probe(path):
    if "hang" in path:
        time.sleep(600)
    if "abort" in path:
        os.abort()
    if "strange" in path:
        raise ValueError("strange")
    return real(path)

real, decode.probe = decode.probe, probe
decode.serve(sys.stdin.buffer, sys.stdout.buffer)
"""
SOMETIMES = [sys.executable, "-c", MISHAPS]


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", 24)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for number in range(COUNT):
            picture = np.full((HEIGHT, WIDTH, 3), 10 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())
    return str(path)


@pytest.fixture(scope="module")
def pool():
    with DecodePool(1, 60) as pool:
        yield pool


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


def reason_of(future) -> str:
    with pytest.raises(VideoError) as caught:
        future.result(timeout=60)
    return caught.value.reason


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.02)
    return False


def test_child_probes_and_reads_as_this_process_does(clip, pool):
    facts = pool.probe(clip).result()
    assert facts == probe(clip)
    indices = [0, 0, 5, 17, 2]
    done = pool.read(clip, facts, indices, PLACEMENT, preview=False).result()
    assert np.array_equal(done.frames, read_frames(clip, facts, indices, PLACEMENT))
    assert done.preview is None


def test_preview_is_a_strip_of_what_the_model_sees(clip, pool):
    done = pool.read(clip, probe(clip), range(COUNT), PLACEMENT, preview=True).result()
    with Image.open(io.BytesIO(done.preview)) as strip:
        pixels = np.asarray(strip)
    assert pixels.shape == (32, 4 * 48, 3)
    for place_in_strip, index in enumerate((0, 6, 13, 19)):
        shown = pixels[8:24, 48 * place_in_strip + 8 :][:, :32]
        assert abs(shown.mean() - done.frames[index].mean()) < 3


def test_preview_is_small_and_the_same_each_time():
    frames = np.random.default_rng(0).integers(0, 256, (3, 480, 720, 3), np.uint8)
    jpeg = decode.make_preview(frames)
    assert jpeg == decode.make_preview(frames)
    with Image.open(io.BytesIO(jpeg)) as strip:
        assert strip.size == (3 * 144, 96)


def test_futures_belong_to_their_requests(clip, pool):
    futures = [pool.read(clip, probe(clip), [number], PLACEMENT, preview=False) for number in range(6)]
    shades = [future.result().frames.mean() for future in futures]
    assert shades == pytest.approx([10 * number for number in range(6)], abs=3)


def test_video_error_of_the_child_travels_back(clip, pool, tmp_path):
    path = tmp_path / "not a video é\udcff.mp4"
    path.write_bytes(b"text")
    assert reason_of(pool.probe(str(path))) == "unreadable"
    assert pool.probe(clip).result() == probe(clip)


def test_relative_paths_are_those_of_the_parent(clip, pool, monkeypatch):
    monkeypatch.chdir(Path(clip).parent)
    assert pool.probe("clip.mp4").result() == probe(clip)


def test_no_child_without_a_task_and_none_left_behind(clip):
    before = children()
    with DecodePool(4, 60) as pool:
        assert children() == before
        pool.probe(clip).result()
        pool.probe(clip).result()
        assert len(children() - before) == 1  # the warm one is taken again
    assert children() == before


def test_decoder_that_never_returns_is_killed(clip):
    with DecodePool(1, 0.3, HANG) as pool:
        first = pool.probe(clip)
        second = pool.read(clip, probe(clip), range(9), PLACEMENT, preview=True)
        start = time.monotonic()
        assert reason_of(first) == reason_of(second) == "timed_out"
        assert time.monotonic() - start < 5


def test_decoder_that_never_returns_cannot_block_a_large_request(clip):
    facts = probe(clip)
    with DecodePool(1, 0.3, HANG) as pool:
        large = pool.read(clip, facts, [0] * 2_000_000, Placement(1, 1, 0, 0, 1, 1), preview=False)
        assert reason_of(large) == "timed_out"


@pytest.mark.parametrize(("command", "ending"), [(ABORT, "SIGABRT"), (EXIT, "exit status 7")])
def test_decoder_that_ends_its_process_is_reported(clip, command, ending):
    with DecodePool(1, 60, command) as pool:
        error = pool.probe(clip).exception()
    assert isinstance(error, VideoError)
    assert (error.reason, error.detail) == ("decoder_crashed", f"its decoder ended with {ending}")


def test_other_clips_are_decoded_after_a_hang_and_a_crash(clip, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    paths = [clip, "/hang.mp4", clip, "/abort.mp4", "/strange.mp4", clip]
    with DecodePool(2, 4, SOMETIMES) as pool:
        futures = [pool.probe(path) for path in paths]
        errors = [future.exception() for future in futures]
    reasons = [error.reason if isinstance(error, VideoError) else error for error in errors]
    assert reasons == [None, "timed_out", None, "decoder_crashed", "decoder_crashed", None]


def test_child_that_cannot_start_is_no_verdict_on_the_video(clip, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with DecodePool(1, 60) as pool, pytest.raises(RuntimeError, match="could not start"):
        pool.probe(clip).result()


def test_child_that_died_between_two_tasks_is_replaced(clip):
    before = children()
    with DecodePool(1, 60) as pool:
        pool.probe(clip).result()
        (child,) = children() - before
        os.kill(child, signal.SIGKILL)
        assert is_gone(child)
        assert pool.probe(clip).result() == probe(clip)


def test_leaving_cancels_what_runs_and_what_waits_at_once(clip):
    before = children()
    start = time.monotonic()
    with DecodePool(1, 600, HANG) as pool:
        running, waiting = pool.probe(clip), pool.probe(clip)
        while not children() - before:
            time.sleep(0.01)
    assert time.monotonic() - start < 5
    assert children() == before
    for future in (running, waiting):
        with pytest.raises(CancelledError):
            future.result()


PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are told to ignore it
from preprocess.decode import DecodePool
import psutil

if __name__ == "__main__":
    with DecodePool(1, 600, *eval(sys.argv[2])) as pool:
        future = pool.probe(sys.argv[1])
        if sys.argv[3] == "idle":
            future.result()
        while not (children := psutil.Process().children()):
            time.sleep(0.01)
        time.sleep(0.2)
        print(children[0].pid, flush=True)
        time.sleep(600)
"""
HANGING_CHILD = """
import os, sys, time
from preprocess import decode
from shared.processes import die_with_parent, ignore_stop_signals

ignore_stop_signals()
die_with_parent()
decode.probe = lambda path: time.sleep(600)
decode.serve(sys.stdin.buffer, sys.stdout.buffer)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a busy child that its parent died")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("state", ["idle", "busy"])
def test_children_die_with_their_parent(clip, how, state):
    command = repr([[sys.executable, "-c", HANGING_CHILD]] if state == "busy" else [])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, clip, command, state],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        parent.send_signal(how)
        parent.wait(timeout=10)
    assert is_gone(child)


def test_what_a_decoder_prints_does_not_reach_the_answers(clip):
    """fd 1 of the child is its stderr: a native library's printf would corrupt the protocol."""
    code = "import os, runpy; from preprocess import probe as module; real = module.probe\n"
    code += "module.probe = lambda path: (os.write(1, b'noise'), real(path))[1]\n"
    code += "runpy.run_module('preprocess.decode', run_name='__main__')"
    with DecodePool(1, 60, [sys.executable, "-c", code]) as pool:
        assert pool.probe(clip).result() == probe(clip)


def test_children_ignore_the_signals_that_are_meant_for_the_parent(clip):
    before = children()
    with DecodePool(1, 60) as pool:
        pool.probe(clip).result()
        (child,) = children() - before
        os.kill(child, signal.SIGINT)
        os.kill(child, signal.SIGTERM)
        assert pool.probe(clip).result() == probe(clip)
        assert children() - before == {child}
