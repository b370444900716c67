"""Two real processes under torchrun: the same losses, weights and order as one."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.training import column, command, rows_of, train_here
from train.checkpoint import list_checkpoints

SETTINGS = {"max_train_steps": 8, "checkpointing_steps": 5, "caption_dropout": 0.3, "lr_scheduler": "linear"}


def torchrun(ranks, *words, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def two(cache, tmp_path_factory):
    """Seven samples at a global batch of 2, one place on each of two ranks."""
    folder = tmp_path_factory.mktemp("two") / "run"
    done = torchrun(2, *command(cache, folder, **SETTINGS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("batches   1 x 2 processes x 1 accumulated = 2; 4 steps an epoch") == 1
    return folder


@pytest.fixture(scope="module")
def one(cache, tmp_path_factory):
    """The same global batch on one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert train_here(cache, folder, **SETTINGS, gradient_accumulation_steps=2) == 0
    return folder


def weights(folder):
    return load_file(folder / "pytorch_lora_weights.safetensors")


def test_two_ranks_see_the_samples_that_one_sees(one, two):
    assert column(two, "samples") == column(one, "samples")
    assert sorted(map(len, column(two, "samples"))) == [1, 1, 2, 2, 2, 2, 2, 2]  # 5 + 2 clips, two epochs


def test_two_ranks_have_the_losses_that_one_has(one, two):
    assert column(two, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)
    assert column(two, "grad_norm") == pytest.approx(column(one, "grad_norm"), rel=1e-3)


def test_the_schedule_counts_optimizer_steps_not_processes(one, two):
    assert column(two, "lr") == column(one, "lr")
    assert column(two, "lr")[-1] == pytest.approx(1e-2 / 8)


def test_two_ranks_end_with_the_weights_that_one_ends_with(one, two):
    ours, expected = weights(two), weights(one)
    for name in expected:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-3, atol=2e-4)
    assert max(value.abs().max().item() for name, value in ours.items() if "lora_B" in name) > 0.02


def test_each_place_has_its_own_draws(two):
    """Were both ranks seeded alike, the two losses of a pair would be those of one noise; see tests/test_draws.py."""
    state = json.loads((two / "checkpoint-5" / "state.json").read_text())
    assert state["position"]["global_batch"] == 2
    assert len({row["loss"] for row in rows_of(two)}) == 8


def test_the_files_are_written_once(two):
    assert column(two, "step") == list(range(1, 9))
    assert [path.name for path in list_checkpoints(two)] == ["checkpoint-5", "checkpoint-8"]


def test_a_run_of_two_ranks_goes_on_on_one(cache, one, two, tmp_path):
    run = shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-8")
    assert train_here(cache, run, **SETTINGS, resume_from_checkpoint="latest") == 0
    assert column(run, "samples") == column(one, "samples")
    assert column(run, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)


@pytest.mark.slow
def test_four_ranks_with_fewer_samples_than_places_take_equal_steps(cache, tmp_path):
    """Places that no sample fills on some ranks, and workers on each: nothing hangs."""
    settings = {"max_train_steps": 4, "train_batch_size": 2}
    done = torchrun(4, *command(cache, tmp_path / "four", **settings, dataloader_num_workers=1))
    assert done.returncode == 0, done.stderr
    train_here(cache, tmp_path / "one", **settings, gradient_accumulation_steps=4)
    assert column(tmp_path / "four", "samples") == column(tmp_path / "one", "samples")
    assert column(tmp_path / "four", "loss") == pytest.approx(column(tmp_path / "one", "loss"), rel=1e-5)


@pytest.mark.slow
def test_a_run_of_one_rank_goes_on_on_two(cache, one, tmp_path):
    run = shutil.copytree(one, tmp_path / "run")
    shutil.rmtree(run / "checkpoint-8")
    done = torchrun(2, *command(cache, run, **SETTINGS, resume_from_checkpoint="latest"))
    assert done.returncode == 0, done.stderr
    assert "1 x 2 processes x 1 accumulated" in done.stdout
    assert column(run, "loss") == pytest.approx(column(one, "loss"), rel=1e-5)
