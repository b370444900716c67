"""shared/console.py: what is told, where, and how, on a terminal and elsewhere."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest

from shared import console
from shared.console import Progress, Terminal, say, show, warn
from tests.conftest import ROOT, run_command


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before = console.terminal()
    yield
    console.configure(before, "")


def told(capsys):
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err.splitlines()


def tell_all():
    say("data set", "squares, 7 clips", clips=7)
    say("video", "a.mp4", label=False)
    warn("one clip is short", "rejected", reason="too_short")
    show("a table")


def test_lines_go_to_stdout_and_warnings_to_stderr(capsys):
    console.configure(Terminal(), "train")
    tell_all()
    assert told(capsys) == (["data set  squares, 7 clips", "a.mp4", "a table"], ["rejected  one clip is short"])


def test_quiet_leaves_warnings_and_what_was_asked_for(capsys):
    console.configure(Terminal(quiet=True), "train")
    tell_all()
    with Progress[None](name="steps", unit="step", total=3) as progress:
        progress.update()
    assert told(capsys) == (["a table"], ["rejected  one clip is short"])


def test_log_json_makes_each_line_an_object(capsys):
    console.configure(Terminal(log_json=True), "train.plan")
    tell_all()
    console.fail("rank = 0")
    out, err = told(capsys)
    assert out[2] == "a table"
    lines = [json.loads(line) for line in [*out[:2], *err]]
    assert [(one["level"], one["stage"], one["event"], one["message"]) for one in lines] == [
        ("info", "train.plan", "data_set", "squares, 7 clips"),
        ("info", "train.plan", "video", "a.mp4"),
        ("warning", "train.plan", "rejected", "one clip is short"),
        ("error", "train.plan", "error", "rank = 0"),
    ]
    assert (lines[0]["fields"], lines[2]["fields"]) == ({"clips": 7}, {"reason": "too_short"})
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", one["time"]) for one in lines)


# --- progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves when it is told to."""

    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(console.time, "monotonic", clock)
    return clock


def test_without_a_terminal_progress_is_a_line_with_the_time_now_and_then(capsys, clock):
    console.configure(Terminal(), "train")
    with Progress[None](name="steps", unit="step", total=1000, start=100) as progress:
        for step in range(400):
            clock.now += 0.5
            progress.update(loss=step / 4)
    out, err = told(capsys)
    assert out == []
    assert 4 <= len(err) <= 400 * 0.5 / 10 + 1  # of 200 s: never more often than each 10 s
    pattern = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d steps     120 of 1000, 2 steps a second, 0:07:20 left, loss 4\.75"
    assert re.fullmatch(pattern, err[0]), err[0]
    assert err[-1].endswith("steps     500 of 1000, 2 steps a second, took 0:03:20, loss 99.75")


def test_what_is_done_at_once_leaves_no_line(capsys, clock):
    console.configure(Terminal(), "train")
    assert list(Progress(range(3), name="clips", unit="clip")) == [0, 1, 2]
    assert told(capsys) == ([], [])


def test_slow_items_are_told_in_seconds_an_item_and_only_by_the_rank_that_tells(capsys, clock):
    console.configure(Terminal(log_json=True), "infer")
    for shown in (True, False):
        for _ in Progress(range(2), name="videos", unit="video", shown=shown):
            clock.now += 20.0
    _, err = told(capsys)
    lines = [json.loads(line) for line in err]
    assert lines[0]["message"] == "1 of 2, 20 s a video, 0:00:20 left"
    assert lines[-1]["fields"] == {
        "done": 2, "total": 2, "unit": "video", "rate": 0.05, "seconds": 40.0, "seconds_left": None,
    }  # fmt: skip
    assert len(lines) == 2, "the end is told once"


BAR = """
import time
from shared.console import Progress, Terminal, configure, say
configure(Terminal(quiet={quiet}), "train")
with Progress(name="steps", unit="step", total=3) as progress:
    for step in range(3):
        say("held out", f"loss {{step}}")
        progress.update(loss=step)
"""


def on_a_terminal(code):
    """What a program writes to a terminal of 100 columns."""
    mine, its = pty.openpty()
    termios.tcsetwinsize(its, (24, 100))
    words = [sys.executable, "-c", code]
    process = subprocess.Popen(words, cwd=ROOT, stdin=its, stdout=its, stderr=its)
    os.close(its)
    written = b""
    try:
        while chunk := os.read(mine, 4096):
            written += chunk
    except OSError:  # Linux tells so that the other end is closed
        pass
    os.close(mine)
    assert process.wait(60) == 0, written
    return written.decode()


def test_on_a_terminal_progress_is_a_bar_and_lines_stand_above_it():
    written = on_a_terminal(BAR.format(quiet=False))
    assert re.search(r"steps: 100%\|█+\| 3/3 \[.*step/s.*loss=2", written)
    assert [line for line in re.split(r"[\r\n]+", written) if line.startswith("held out")] == [
        f"held out  loss {step}" for step in range(3)
    ]


def test_quiet_on_a_terminal_shows_no_bar():
    assert on_a_terminal(BAR.format(quiet=True)) == ""


# --- the flags, of every command


@pytest.mark.parametrize("words", [["train"], ["infer"], ["preprocess"], ["preprocess.ls", "x"]], ids=" ".join)
def test_every_command_takes_them_and_tells_its_error_as_they_say(words, tmp_path):
    asked = ["-m", *words, "--config", str(tmp_path / "none.toml")]
    plain, as_json, debug = (run_command(*asked, *more) for more in ((), ("--log_json",), ("--debug",)))
    assert plain.returncode == as_json.returncode == debug.returncode == 2
    (line,) = plain.stderr.splitlines()
    assert line.startswith("error: --config ")
    (told,) = map(json.loads, as_json.stderr.splitlines())
    assert (told["level"], told["message"], told["stage"]) == ("error", line.removeprefix("error: "), words[0])
    assert debug.stderr.startswith("Traceback (most recent call last):")
    assert debug.stderr.splitlines()[-1] == line


def test_they_are_no_keys_of_a_file(tmp_path):
    (tmp_path / "a.toml").write_text("quiet = true\n")
    done = run_command("-m", "train", "--config", str(tmp_path / "a.toml"))
    assert done.returncode == 2
    assert "quiet is about the terminal, not the run; give --quiet on the command line" in done.stderr


def test_one_with_a_value_is_refused():
    done = run_command("-m", "train", "--log_json=yes")
    assert done.returncode == 2
    assert "--log_json=yes: --log_json takes no value" in done.stderr
