"""SIGKILL at instants that nobody chose, again and again: the run ends as the one that nobody interrupted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from shared.errors import CheckpointError
from tests.conftest import ROOT
from tests.training import command, facts_of, lora_of, rows_of, train_here, wait_until
from train.checkpoint import list_checkpoints, read_state

KILLS = 10
STEPS = 300  # more than a fast machine takes between ten kills
SETTINGS = {
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "gradient_accumulation_steps": 2,
    "caption_dropout": 0.4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
}


def steps_of(run):
    """Rows that are whole; a killed run's last ones are cut off once the next one begins."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_anywhere_ends_bit_equal(cache, tmp_path):
    """A checkpoint each step, so that most of the time one is being written, rotated, or rows are cut off."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train_here(cache, whole, **SETTINGS) == 0
    rng = random.Random(0)
    steps = []
    start = 0.0  # seconds from a process to its first new step, at the last look
    for kill in range(KILLS):
        workers = 1 if kill == 4 else 0
        words = command(cache, run, **SETTINGS, resume_from_checkpoint="latest", dataloader_num_workers=workers)
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        try:
            if kill % 3 == 2:  # wherever it is: importing, loading, checking, or at its first steps
                time.sleep(rng.uniform(0, 1.1) * start)
            else:  # some steps on, so that the run gets anywhere on however slow a machine
                began, known = time.monotonic(), steps_of(run)
                wait_until(lambda: steps_of(run) > known, process)  # noqa: B023
                start = time.monotonic() - began
                goal = known + rng.randint(1, 6)
                wait_until(lambda: steps_of(run) >= goal, process)  # noqa: B023
                time.sleep(rng.uniform(0, 0.15))
            assert process.poll() is None, "the run ended before it was killed: give it more steps"
        finally:
            process.kill()
            _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        whole_ones = list_checkpoints(run)
        for folder in whole_ones:  # what has its name is complete
            try:
                read_state(folder)
            except CheckpointError as error:
                pytest.fail(str(error))
        steps.append(int(whole_ones[-1].name.rpartition("-")[2]) if whole_ones else 0)
    assert steps == sorted(steps)
    assert len(set(steps)) > KILLS // 2, steps
    assert steps[-1] < STEPS
    assert train_here(cache, run, **SETTINGS, resume_from_checkpoint="latest") == 0
    assert len(rows_of(run)) == STEPS
    assert facts_of(run) == facts_of(whole)
    assert lora_of(run) == lora_of(whole)
    assert [path.name for path in list_checkpoints(run)] == [path.name for path in list_checkpoints(whole)]
