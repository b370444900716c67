"""The largest bucket, tried before the first step; and steps that slow down."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shared.errors import ConfigError
from shared.geometry import Bucket
from tests.training import column, facts_of, lora_of, rows_of, train_here
from train import log, loop, rehearsal
from train.log import SLOW_AFTER, WARM_UP, SlowSteps
from train.run import Run


@pytest.fixture
def due(monkeypatch):
    """Rehearse on a CPU too."""
    monkeypatch.setattr(loop, "is_needed", lambda device: True)


@pytest.mark.parametrize(
    "flags",
    [
        {"lora_dropout": 0.2, "ema_decay": 0.9},
        {"stream_blocks": 2, "offload_activations": True, "ff_chunks": 2, "optimizer_offload": True},
    ],
    ids=["plain", "levers"],
)
def test_a_rehearsal_changes_no_number_and_tells_the_plan(cache, tmp_path, monkeypatch, capsys, flags):
    settings = {"max_train_steps": 3, "train_batch_size": 2, **flags}
    train_here(cache, tmp_path / "plain", **settings)
    assert "planned" not in capsys.readouterr().out  # on a CPU there is none
    monkeypatch.setattr(loop, "is_needed", lambda device: True)
    train_here(cache, tmp_path / "rehearsed", **settings)
    assert facts_of(tmp_path / "rehearsed") == facts_of(tmp_path / "plain")
    assert column(tmp_path / "rehearsed", "lora_norm") == column(tmp_path / "plain", "lora_norm")
    assert lora_of(tmp_path / "rehearsed") == lora_of(tmp_path / "plain")
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("memory"))
    assert line.startswith("memory    9x64x96: ")
    assert line.endswith(" GiB planned")


def test_a_resumed_run_is_rehearsed_and_stays_the_same(cache, tmp_path, due):
    train_here(cache, tmp_path / "whole", max_train_steps=4)
    train_here(cache, tmp_path / "run", max_train_steps=4, checkpointing_steps=2)
    for left in ("checkpoint-4",):
        for path in (tmp_path / "run" / left).iterdir():
            path.unlink()
        (tmp_path / "run" / left).rmdir()
    train_here(cache, tmp_path / "run", max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert facts_of(tmp_path / "run") == facts_of(tmp_path / "whole")
    assert lora_of(tmp_path / "run") == lora_of(tmp_path / "whole")


def test_memory_that_runs_out_is_told_with_the_plan_s_advice(cache, tmp_path, due, monkeypatch):
    def full(run, bucket):
        assert bucket in (Bucket(9, 64, 96), Bucket(9, 96, 64))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rehearsal, "_forward_and_backward", full)
    monkeypatch.setattr(rehearsal, "room", lambda size: size * 9 // 10)
    with pytest.raises(ConfigError) as error:
        train_here(cache, tmp_path / "run", max_train_steps=2)
    told = str(error.value)
    assert "the memory of cpu ran out; a step holds 0.0" in told
    assert "; add --offload_activations" in told
    assert "\n" not in told
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_where_no_lever_is_enough_it_says_so(cache, tmp_path, due, monkeypatch):
    def full(run, bucket):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rehearsal, "_forward_and_backward", full)
    with pytest.raises(ConfigError, match="no lever that keeps the numbers is enough"):
        train_here(cache, tmp_path / "run", max_train_steps=2)


@pytest.mark.parametrize(
    "flags",
    [{}, {"optimizer": "prodigy", "learning_rate": 1.0}, {"use_8bit_adam": True, "rank": 128}],
    ids=["adamw", "prodigy", "8 bits"],
)
def test_as_many_bytes_are_held_for_the_optimizer_as_it_then_takes(cache, tmp_path, monkeypatch, flags):
    """Prodigy holds less where a matrix began at zero, bitsandbytes its scales besides."""
    runs: list[Run] = []
    stood_in: list[int] = []

    def look(run):
        runs.append(run)
        stood_in.append(sum(one.nbytes for one in rehearsal._state_to_come(run)))

    monkeypatch.setattr(loop, "is_needed", lambda device: True)
    monkeypatch.setattr(loop, "rehearse", look)
    train_here(cache, tmp_path / "run", max_train_steps=1, **flags)
    (run,) = runs
    states = run.state.optimizer.state.values()
    held = {one.data_ptr(): one.nbytes for state in states for one in state.values() if torch.is_tensor(one)}
    assert sum(held.values()) == pytest.approx(stood_in[0], rel=0.15)


@pytest.mark.parametrize("full", [False, True])
def test_on_a_gpu_what_was_measured_and_what_is_to_be_had_are_told(cache, tmp_path, monkeypatch, capsys, full):
    """The GPU's answers are stood in for: 3 and 4 GiB of the step; of a card of 8 GiB 2 are free, 1 is the run's."""
    gib = 2**30
    answers = {
        "reset_peak_memory_stats": None, "max_memory_allocated": 3 * gib, "max_memory_reserved": 4 * gib,
        "mem_get_info": (2 * gib, 8 * gib), "memory_reserved": gib,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)

    def without(run, bucket):
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def rehearse(run):
        where = SimpleNamespace(device=torch.device("cuda"), mixed_precision="no", num_processes=1)
        there: Any = SimpleNamespace(**{**vars(run), "accelerator": where}, is_main=True)
        rehearsal.rehearse(there)

    monkeypatch.setattr(rehearsal, "_forward_and_backward", without)
    monkeypatch.setattr(loop, "is_needed", lambda device: True)
    monkeypatch.setattr(loop, "rehearse", rehearse)
    if full:
        with pytest.raises(ConfigError, match=r"memory of cuda ran out; .* 3\.00 of 8\.00 GiB are to be had; add --"):
            train_here(cache, tmp_path / "run", max_train_steps=1)
    else:
        train_here(cache, tmp_path / "run", max_train_steps=1)
        assert " GiB planned, 3.00 allocated, 4.00 reserved\n" in capsys.readouterr().out


def rows(*seconds: float):
    return [{"seconds": one + 0.5, "data_seconds": 0.5} for one in seconds]


def said(slow: SlowSteps, made, bucket: str = "9x64x96") -> list[str]:
    return [line for row in made if (line := slow.warning(row, bucket))]


def test_steps_that_slow_down_are_told_once():
    slow = SlowSteps()
    assert not said(slow, rows(*[9.0] * WARM_UP, *[1.0] * 10))
    assert not said(slow, rows(*[4.0] * (SLOW_AFTER - 1), 1.0, *[4.0] * (SLOW_AFTER - 1)))
    (line,) = said(slow, rows(*[4.0] * 20))
    assert "4.0 s for 1.0 s, of 9x64x96" in line
    assert "\n" not in line


def test_other_buckets_waits_for_data_and_mild_changes_are_not_slow():
    slow = SlowSteps()
    assert not said(slow, rows(*[1.0] * 20))
    assert not said(slow, rows(*[20.0] * 20), "49x480x720")
    assert not said(slow, rows(*[2.9] * 40))
    assert not said(slow, [{"seconds": 90.0, "data_seconds": 89.0}] * 20)


def test_a_run_tells_each_step_with_the_bucket_of_its_clips(cache, tmp_path, monkeypatch, squares, capsys):
    """Where steps are watched: on a GPU, else here alone."""
    told: list[tuple[int, str]] = []

    class Slow(SlowSteps):
        def warning(self, row, bucket):
            told.append((row["step"], bucket))
            return "warning   as slow as can be" if row["step"] == 2 else None

    monkeypatch.setattr(log, "is_watched", lambda device: True)
    monkeypatch.setattr(log, "SlowSteps", Slow)
    train_here(cache, tmp_path / "run", max_train_steps=7)
    columns = squares.columns("sample_id", "bucket")
    buckets = dict(zip(columns["sample_id"].to_pylist(), columns["bucket"].to_pylist(), strict=True))
    assert told == [(row["step"], buckets[row["samples"][0]]) for row in rows_of(tmp_path / "run")]
    assert {bucket for _, bucket in told} == {"9x64x96", "9x96x64"}
    assert capsys.readouterr().err.count("warning   as slow as can be") == 1
