"""A run that was killed and goes on is, to the last bit, the run that was not."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from shared.errors import CheckpointError
from tests.conftest import ROOT, run_command
from tests.training import column, command, facts_of, lora_of, rows_of, train_apart, train_here
from train import checkpoint as checkpoints
from train import loop, metrics
from train.checkpoint import list_checkpoints

# Everything that a resume could get wrong: accumulation, short batches, dropped captions, mirrored clips (the data set
# has them), a learning rate that rises and falls.
SETTINGS = {
    "max_train_steps": 12,
    "checkpointing_steps": 7,
    "gradient_accumulation_steps": 2,
    "caption_dropout": 0.4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
}

KILLED_AFTER_STEP_9 = """
import os, signal, sys
from train.metrics import Metrics
write = Metrics.write
def write_and_die(self, row):
    write(self, row)
    if row["step"] == 9:
        os.kill(os.getpid(), signal.SIGKILL)
Metrics.write = write_and_die
from train.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_here(cache, folder, **SETTINGS) == 0
    return folder


@pytest.fixture(scope="module")
def killed(cache, tmp_path_factory):
    """The same run, killed by SIGKILL two steps after its checkpoint, in the instant that a row was written."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    done = run_command("-c", KILLED_AFTER_STEP_9, *command(cache, folder, **SETTINGS)[2:])
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert column(folder, "step") == list(range(1, 10))
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint-7"]
    return folder


def same_run(one, other):
    assert facts_of(one) == facts_of(other)
    assert lora_of(one) == lora_of(other)
    return True


def test_a_killed_run_goes_on_bit_equal(cache, whole, killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    assert train_here(cache, run, **SETTINGS, resume_from_checkpoint="latest") == 0
    assert same_run(run, whole)
    assert len({row["loss"] for row in rows_of(run)}) == 12
    assert column(run, "lr")[8] != column(run, "lr")[9]


def test_it_goes_on_bit_equal_with_another_number_of_workers(cache, whole, killed, tmp_path):
    """In a process of its own, as a user would."""
    run = shutil.copytree(killed, tmp_path / "run")
    done = train_apart(cache, run, **SETTINGS, resume_from_checkpoint="latest", dataloader_num_workers=1)
    assert done.returncode == 0, done.stderr
    assert "steps     7 to 12" in done.stdout
    assert same_run(run, whole)


def test_it_goes_on_with_a_batch_in_place_of_accumulation(cache, whole, killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    settings = {**SETTINGS, "gradient_accumulation_steps": 1, "train_batch_size": 2}
    assert train_here(cache, run, **settings, resume_from_checkpoint="latest") == 0
    assert column(run, "samples") == column(whole, "samples")
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=1e-4)


def test_the_checkpoint_s_global_batch_counts_and_that_is_told(cache, whole, killed, tmp_path, capsys):
    run = shutil.copytree(killed, tmp_path / "run")
    settings = {**SETTINGS, "gradient_accumulation_steps": 5}
    assert train_here(cache, run, **settings, resume_from_checkpoint="latest") == 0
    assert "the checkpoint's global batch; --gradient_accumulation_steps 5 does not count" in capsys.readouterr().out
    assert same_run(run, whole)


def test_an_image_to_video_run_with_dropped_images_goes_on_bit_equal(image_cache, tmp_path, monkeypatch, capsys):
    """Variants of first frames, their draws, and which of them are dropped; read by a worker after the second start."""
    settings = {**SETTINGS, "max_train_steps": 6, "checkpointing_steps": 2, "noised_image_dropout": 0.4}
    assert train_here(image_cache, tmp_path / "whole", **settings) == 0
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        crash_when(patched, loop, "take_step", lambda run, step, *_: step == 3)
        with pytest.raises(Crash):
            train_here(image_cache, run, **settings)
    assert train_here(image_cache, run, **settings, resume_from_checkpoint="latest", dataloader_num_workers=1) == 0
    assert "steps     2 to 6" in capsys.readouterr().out
    assert same_run(run, tmp_path / "whole")
    with pytest.raises(CheckpointError, match=r"noised_image_dropout was 0\.4 and is now 0\.1"):
        train_here(image_cache, run, **{**settings, "noised_image_dropout": 0.1}, resume_from_checkpoint="latest")


class Crash(BaseException):
    """The end of a process, for a test that goes on: nothing of ours catches it."""


def crash_when(monkeypatch, module, name, when, *, after=False):
    """Crash at the first call of a function for which `when` holds: before it has done its work, or after."""
    function = getattr(module, name)

    def crashing(*args, **settings):
        if after:
            function(*args, **settings)
        if when(*args):
            raise Crash
        return None if after else function(*args, **settings)

    monkeypatch.setattr(module, name, crashing)


INSTANTS = {
    "before any checkpoint": (loop, "take_step", lambda run, step, *_: step == 3, 0),
    "between step and row": (metrics.Metrics, "write", lambda self, row: row["step"] == 10, 7),
    "before the rows are on the disk": (metrics.Metrics, "sync", lambda self: True, 0),
    "before the checkpoint's files": (checkpoints, "pack_state", lambda *_: True, 0),
    "in the half-built checkpoint": (checkpoints, "fsync_folder", lambda folder: folder.name == ".checkpoint-7.tmp", 0),
    "after its rename": (loop, "rotate_checkpoints", lambda *_: True, 7),
    "in the last checkpoint": (checkpoints, "fsync_folder", lambda folder: folder.name == ".checkpoint-12.tmp", 7),
    "before the final file": (loop, "rotate_checkpoints", lambda folder, _: (folder / "checkpoint-12").exists(), 12),
}


@pytest.mark.parametrize("instant", INSTANTS)
def test_whatever_the_instant_it_goes_on_bit_equal(cache, whole, tmp_path, monkeypatch, instant):
    module, name, when, first_step = INSTANTS[instant]
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        crash_when(patched, module, name, when)
        with pytest.raises(Crash):
            train_here(cache, run, **SETTINGS)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # a row that was never finished
    taken, take_step = [], loop.take_step

    def take_and_tell(*args, **settings):
        taken.append(args[1])
        return take_step(*args, **settings)

    monkeypatch.setattr(loop, "take_step", take_and_tell)
    assert train_here(cache, run, **SETTINGS, resume_from_checkpoint="latest") == 0
    assert taken == list(range(first_step, 12))
    assert same_run(run, whole)


def test_resuming_twice_is_resuming_once(cache, whole, tmp_path, monkeypatch):
    run, settings = tmp_path / "run", {**SETTINGS, "checkpointing_steps": 2}
    for stop in (5, 8, 11):
        with monkeypatch.context() as patched:
            crash_when(patched, loop, "take_step", lambda run, step, *_, stop=stop: step == stop)
            with pytest.raises(Crash):
                train_here(cache, run, **settings, resume_from_checkpoint="latest")
    assert train_here(cache, run, **settings, resume_from_checkpoint="latest") == 0
    assert same_run(run, whole)


@pytest.mark.slow
def test_sigterm_to_all_processes_of_a_run_saves_and_exits_143(cache, whole, tmp_path):
    """As a cluster sends it: the worker that reads gets it too, and must not take the run down before it has saved."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *command(cache, run, **{**SETTINGS, "max_train_steps": 100_000}, dataloader_num_workers=1)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until = time.monotonic() + 120
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= 2):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGTERM)
        out, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    last = column(run, "step")[-1]
    assert list_checkpoints(run)[-1].name == f"checkpoint-{last}"
    assert f"stopped by signal 15 after step {last}; its checkpoint is saved" in out
    assert column(run, "loss")[:1] == column(whole, "loss")[:1]
