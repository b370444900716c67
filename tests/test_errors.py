"""What a command says and how it ends, for mistakes of the user and of ours."""

import json
import re
import subprocess
import sys

import pytest

from shared import errors
from shared.errors import REJECTION_REASONS, ConfigError, UserError, VideoError, run_command
from tests.conftest import ROOT


def status_of(main):
    with pytest.raises(SystemExit) as ended:
        run_command(main, [])
    return ended.value.code


def raising(error):
    def main(argv):
        raise error

    return main


def test_user_errors_are_one_line_and_status_2(capsys):
    assert status_of(raising(ConfigError("rank = 0;\n  must be\tat least 1"))) == 2
    printed = capsys.readouterr()
    assert printed.err == "error: rank = 0; must be at least 1\n"
    assert printed.out == ""


@pytest.mark.parametrize("status", [0, 1, 143])
def test_the_status_of_main_is_the_status_of_the_process(status):
    assert status_of(lambda argv: status) == status


def test_main_is_given_the_words_of_the_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--rank", "4"])
    with pytest.raises(SystemExit) as ended:
        run_command(lambda argv: len(argv) if argv == ["--rank", "4"] else 0)
    assert ended.value.code == 2


def test_debug_prints_the_traceback_of_a_user_error_before_its_line(monkeypatch, capsys):
    monkeypatch.setenv("LATENTREEL_DEBUG", "1")
    assert status_of(raising(ConfigError("rank = 0"))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (lines[0], lines[-1]) == ("Traceback (most recent call last):", "error: rank = 0")


@pytest.mark.parametrize(
    ("raised", "debug", "status", "traceback"),
    [
        ("ZeroDivisionError('ours')", "", 1, True),
        ("errors.CacheError('theirs')", "", 2, False),
        ("errors.CacheError('theirs')", "1", 2, True),
    ],
)
def test_only_defects_keep_their_traceback_and_end_with_1(raised, debug, status, traceback):
    code = f"from shared import errors\ndef main(argv): raise {raised}\nerrors.run_command(main, [])"
    environment = {"PYTHONPATH": str(ROOT), "LATENTREEL_DEBUG": debug}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert ("Traceback" in done.stderr) == traceback
    assert len(done.stderr.splitlines()) == 1 or traceback


def test_with_log_json_a_defect_is_one_line_that_holds_its_traceback():
    code = (
        "from shared import console, errors\n"
        "console.configure(console.Terminal(log_json=True), 'train')\n"
        "def main(argv): raise ZeroDivisionError('ours')\n"
        "errors.run_command(main, [])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    (line,) = done.stderr.splitlines()
    told = json.loads(line)
    assert (done.returncode, told["level"], told["message"]) == (1, "error", "ZeroDivisionError: ours")
    assert told["fields"]["traceback"].startswith("Traceback")


def test_ctrl_c_is_a_line_and_status_130(capsys):
    assert status_of(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped   by Ctrl-C: what is complete stays\n"


def test_a_reader_that_has_seen_enough_is_no_traceback():
    code = (
        "from shared.errors import run_command\n"
        "def main(argv):\n"
        "    for _ in range(100_000): print('a line')\n"
        "    return 0\n"
        "run_command(main, [])"
    )
    command = f'{sys.executable} -c "$CODE" | head -n 1'
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env={"CODE": code, "PATH": "/usr/bin:/bin"}, capture_output=True, check=False
    )
    assert done.stdout == b"a line\n"
    assert done.stderr == b""


def test_the_tree_at_the_top_names_every_mistake_and_no_other():
    drawn = set(re.findall(r"^    (?:│   )?(?:├── |└── )?(\w+Error) ", errors.__doc__, re.MULTILINE))
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, UserError)}
    assert drawn == defined


def test_a_video_error_carries_its_reason_and_what_was_found():
    error = VideoError("too_short", "5 of 9 frames")
    assert (error.reason, error.detail, str(error)) == ("too_short", "5 of 9 frames", "too_short: 5 of 9 frames")


def test_reasons_are_a_closed_list():
    with pytest.raises(AssertionError):
        VideoError("ugly", "not on the list")
    assert all(re.fullmatch(r"[a-z_]+", reason) for reason in REJECTION_REASONS)
