"""torchrun and its processes: signals, kills, a main process that is slow, an output folder that is taken."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil  # type: ignore[import-untyped]
import pytest

from tests.conftest import ROOT, run_command
from tests.training import (
    column,
    command,
    facts_of,
    lora_of,
    rows_of,
    start_ranks,
    train_apart,
    train_here,
    train_on_ranks,
    wait_until,
)  # fmt: skip
from train.checkpoint import list_checkpoints

pytestmark = pytest.mark.slow

# All that a resume could get wrong, on two ranks with a worker or two each.
SETTINGS = {
    "max_train_steps": 10,
    "checkpointing_steps": 5,
    "gradient_accumulation_steps": 2,
    "caption_dropout": 0.4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 3,
}


def step_of(run):
    return len(rows_of(run)) if (run / "metrics.jsonl").exists() else 0


def family(process):
    """A process's descendants."""
    return psutil.Process(process.pid).children(recursive=True)


def are_gone(processes, seconds):
    """Whether all have ended in that time; an orphan that nobody has reaped yet has."""
    until = time.monotonic() + seconds
    while any(other.is_running() and other.status() != psutil.STATUS_ZOMBIE for other in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def end(launcher, processes):
    for process in (launcher, *processes):
        if process.is_running() if isinstance(process, psutil.Process) else process.poll() is None:
            process.kill()
    launcher.communicate()


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """The run of two ranks that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = train_on_ranks(2, cache, folder, **SETTINGS)
    assert done.returncode == 0, done.stderr
    assert "batches   1 x 2 processes x 2 accumulated = 4" in done.stdout
    return folder


@pytest.fixture(scope="module")
def killed(cache, tmp_path_factory):
    """The same run, whose launcher got SIGKILL when rank 0 had written the row of step 8; rank 1 was in step 9."""
    folder = tmp_path_factory.mktemp("killed")
    run = folder / "run"
    settings = {**SETTINGS, "dataloader_num_workers": 2}
    launcher = start_ranks(2, *command(cache, run, records=folder, **settings), TEST_SLEEP_AFTER="8")
    processes = []
    try:
        wait_until(lambda: step_of(run) == 8, launcher)
        processes = family(launcher)
        assert len(processes) >= 2 + 4, "two ranks, and two workers each"
        launcher.kill()
        launcher.wait()
        assert are_gone(processes, seconds=3), [process.cmdline() for process in processes if process.is_running()]
    finally:
        end(launcher, processes)
    assert [path.name for path in list_checkpoints(run)] == ["checkpoint-5"]
    return run


def test_a_killed_launcher_takes_its_processes_along_and_the_run_goes_on_bit_equal(cache, whole, killed, tmp_path):
    run = shutil.copytree(killed, tmp_path / "run")
    settings = {**SETTINGS, "dataloader_num_workers": 1}
    done = train_on_ranks(2, cache, run, **settings, resume_from_checkpoint="latest")
    assert done.returncode == 0, done.stderr
    assert "steps     5 to 10" in done.stdout
    assert facts_of(run) == facts_of(whole)
    assert lora_of(run) == lora_of(whole)


@pytest.mark.parametrize("ranks", [1, 4])
def test_it_goes_on_on_another_number_of_ranks(cache, whole, killed, tmp_path, ranks):
    run = shutil.copytree(killed, tmp_path / "run")
    settings = {**SETTINGS, "resume_from_checkpoint": "latest"}
    if ranks == 1:
        assert train_here(cache, run, **settings) == 0
    else:
        done = train_on_ranks(ranks, cache, run, **settings)
        assert done.returncode == 0, done.stderr
        assert "batches   1 x 4 processes x 1 accumulated = 4" in done.stdout
    for name in ("step", "samples", "lr"):
        assert column(run, name) == column(whole, name)
    assert column(run, "loss") == pytest.approx(column(whole, "loss"), rel=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_first(cache, tmp_path, number):
    """SIGTERM goes to every process, as a cluster sends it: each rank gets it twice, the second time by torchrun."""
    run = tmp_path / "run"
    settings = {"max_train_steps": 100_000, "checkpointing_steps": 100_000, "dataloader_num_workers": 1}
    launcher = start_ranks(2, *command(cache, run, **settings))
    processes = []
    try:
        wait_until(lambda: step_of(run) >= 2, launcher)
        processes = family(launcher)
        if number == signal.SIGTERM:
            for process in processes:
                process.send_signal(number)
        launcher.send_signal(number)
        out, errors = launcher.communicate(timeout=60)
        assert are_gone(processes, seconds=3)
    finally:
        end(launcher, processes)
    (checkpoint,) = list_checkpoints(run)
    assert f"stopped by signal {int(number)} after step {step_of(run)}; its checkpoint is saved" in out
    assert checkpoint.name == f"checkpoint-{step_of(run)}"
    assert launcher.returncode == 1, errors  # torchrun's own, whatever its processes' (143, 130)


def test_a_killed_rank_ends_the_run(cache, tmp_path):
    run = tmp_path / "run"
    launcher = start_ranks(2, *command(cache, run, max_train_steps=100_000), TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    processes = []
    try:
        wait_until(lambda: step_of(run) >= 1, launcher)
        processes = family(launcher)
        (other,) = (process for process in processes if process.environ().get("RANK") == "1")
        other.kill()
        launcher.communicate(timeout=60)
        assert are_gone(processes, seconds=3)
    finally:
        end(launcher, processes)
    assert launcher.returncode == 1


def test_a_main_process_slower_than_the_time_out_ends_no_run(cache, tmp_path):
    """Two checkpoints of eight seconds each, and collectives that are given up after four."""
    settings = {"max_train_steps": 4, "checkpointing_steps": 2, "nccl_timeout": 4}
    started = time.monotonic()
    launcher = start_ranks(2, *command(cache, tmp_path / "run", records=tmp_path, **settings), TEST_SLOW_MAIN="8")
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert time.monotonic() - started > 16
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4]


def test_videos_that_take_longer_than_the_time_out_end_no_run(cache, tmp_path):
    """The other rank waits for stage 3 outside of any collective; stage 3 takes four times as long as these may."""
    settings = {"max_train_steps": 4, "validation_steps": 2, "validation_inference_steps": 1, "nccl_timeout": 1}
    done = train_on_ranks(2, cache, tmp_path / "run", **settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("videos    2 of step ") == 2
    assert column(tmp_path / "run", "step") == [1, 2, 3, 4]


def test_stage_3_ends_with_a_run_that_is_killed(cache, tmp_path):
    words = command(cache, tmp_path / "run", max_train_steps=1, validate_first=True, validation_inference_steps=1000)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        log, children = tmp_path / "run" / "validation" / "step-0" / "log.txt", []
        try:
            wait_until(log.exists, run)
            wait_until(lambda: any("infer" in " ".join(child.cmdline()) for child in family(run)), run)
            children = family(run)
            time.sleep(2)  # it is at work, and has asked to end with its parent
            assert all(child.is_running() for child in children)
            run.kill()
            assert are_gone(children, seconds=3)
        finally:
            end(run, children)


def test_the_time_out_is_that_of_the_collectives(cache, tmp_path):
    """Were there none, the test above would show nothing: a rank that sleeps outside of `main_at_work` ends the run."""
    settings = {"max_train_steps": 4, "nccl_timeout": 4}
    launcher = start_ranks(
        2, *command(cache, tmp_path / "run", records=tmp_path, **settings),
        TEST_SLEEP_AFTER="2", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="1",
    )  # fmt: skip
    try:
        _, errors = launcher.communicate(timeout=120)
    finally:
        end(launcher, [])
    assert launcher.returncode == 1
    assert "4000ms" in errors


def accelerate(name, *words):
    """`accelerate launch` with a file of ours, two processes on the CPU."""
    file = ROOT / "configs" / "accelerate" / name
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(file)]
    return run_command(*launch, *words, ACCELERATE_USE_CPU="true")


def test_accelerate_launch_trains_on_two_processes(cache, whole, tmp_path):
    done = accelerate("ddp.yaml", *command(cache, tmp_path / "run", **SETTINGS))
    assert done.returncode == 0, done.stderr
    assert "batches   1 x 2 processes x 2 accumulated = 4" in done.stdout
    assert facts_of(tmp_path / "run") == facts_of(whole)
    assert lora_of(tmp_path / "run") == lora_of(whole)


def test_accelerate_launch_with_fsdp_is_refused(cache, tmp_path):
    done = accelerate("fsdp2.yaml", *command(cache, tmp_path / "run", **SETTINGS))
    assert done.returncode == 1
    assert "error: accelerate's distributed_type FSDP; must be MULTI_GPU (DDP)" in done.stderr
    assert "exitcode  : 2" in done.stderr


def test_accelerate_that_is_killed_has_its_one_process_save_and_end(cache, tmp_path):
    """With one process it is no torchrun, and gone at the first Ctrl-C: SIGTERM comes from the kernel."""
    run = tmp_path / "run"
    settings = {"max_train_steps": 100_000, "checkpointing_steps": 100_000}
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    launcher = subprocess.Popen(
        [*words, *command(cache, run, **settings)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    processes = []
    try:
        wait_until(lambda: step_of(run) >= 1, launcher)
        processes = family(launcher)
        launcher.kill()
        assert are_gone(processes, seconds=20)
    finally:
        end(launcher, processes)
    (checkpoint,) = list_checkpoints(run)
    assert checkpoint.name == f"checkpoint-{step_of(run)}"


def test_a_second_run_on_a_live_folder_is_refused_in_one_line(cache, tmp_path):
    run = tmp_path / "run"
    settings = {"max_train_steps": 100_000, "checkpointing_steps": 100_000}
    first = subprocess.Popen(
        [sys.executable, *command(cache, run, **settings)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: step_of(run) >= 1, first)
        on_one, on_two = train_apart(cache, run, **settings), train_on_ranks(2, cache, run, **settings)
        assert first.poll() is None
    finally:
        end(first, [])
    line = f"error: --output_dir {run}: another run is writing there; wait for it, or give another"
    assert (on_one.returncode, on_one.stderr.strip()) == (2, line)
    assert on_two.returncode == 1
    assert on_two.stderr.count(line) == 1
    assert "exitcode  : 2" in on_two.stderr
