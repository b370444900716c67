"""Waiting for the main process, on a store of one process and two threads."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.errors import CheckpointError, ConfigError
from tests.conftest import ROOT
from train import ranks
from train.ranks import check_same_start, launcher, main_at_work

MAIN: Any = SimpleNamespace(is_main_process=True, process_index=0)
OTHER: Any = SimpleNamespace(is_main_process=False, process_index=3)


@pytest.fixture
def store(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks, "_store", lambda: store)
    return store


def test_a_process_by_itself_waits_for_nobody():
    with main_at_work(OTHER, "anything"):
        pass
    check_same_start(OTHER, ROOT, 5, {})


@pytest.mark.usefixtures("store")
def test_the_others_leave_when_the_main_one_has():
    left = []

    def other():
        with main_at_work(OTHER, "checkpoint-5"):
            left.append("entered")
        left.append("left")

    waiting = threading.Thread(target=other, daemon=True)
    with main_at_work(MAIN, "checkpoint-4"):  # that of another step frees nobody
        pass
    with main_at_work(MAIN, "checkpoint-5"):
        waiting.start()
        time.sleep(0.3)
        assert left == ["entered"]
    waiting.join(timeout=10)
    assert left == ["entered", "left"]


@pytest.mark.usefixtures("store")
def test_when_the_main_one_fails_the_others_end_without_a_word(capsys):
    with pytest.raises(CheckpointError, match="taken"):
        with main_at_work(MAIN, "lock"):
            raise CheckpointError("taken")
    with pytest.raises(SystemExit) as end:
        with main_at_work(OTHER, "lock"):
            pass
    assert end.value.code == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("store")
def test_ranks_that_see_another_output_folder_are_refused(tmp_path):
    check_same_start(MAIN, tmp_path, 500, {})
    check_same_start(OTHER, tmp_path, 500, {})
    with pytest.raises(CheckpointError) as caught:
        check_same_start(OTHER, tmp_path, 0, {})
    assert str(caught.value) == (
        f"--output_dir {tmp_path}: process 3 goes on from step 0, the main one from step 500; give a folder that all "
        "machines of the run share"
    )


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("name", "own", "main"), [("learning_rate", 1e-4, 1e-3), ("dataset_digest", "ab", "cd"), ("held_out", None, "ab")]
)
def test_ranks_that_would_train_something_else_are_refused(tmp_path, name, own, main):
    """Two machines are started by hand, each with its flags, and may see another version of the data set."""
    position = {"base_model": "/here/2b", "targets": ["to_q"], name: main}
    check_same_start(MAIN, tmp_path, 0, position)
    check_same_start(OTHER, tmp_path, 0, {**position, "base_model": "/there/2b"})
    with pytest.raises(ConfigError) as caught:
        check_same_start(OTHER, tmp_path, 0, {**position, name: own})
    assert str(caught.value) == (
        f"{name}: is {own!r} on process 3 and {main!r} on the main one; give all processes of the run the same flags "
        "and the same version of the data set"
    )


def test_a_shell_is_no_launcher(monkeypatch):
    for variable in ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(variable, raising=False)
    assert launcher() is None
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # somebody's shell may have it
    assert launcher() is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert launcher() == "torchrun"


def test_accelerate_is_a_launcher_by_its_command_line(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    child = "from train.ranks import launcher; print(launcher())"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    for words, expected in ((["launch", "-m", "train"], "accelerate"), (["env"], "None")):
        done = subprocess.run(
            [sys.executable, "-c", parent, *words], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == expected
