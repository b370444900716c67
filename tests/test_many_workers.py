"""What docs/many_workers.md tells to type, typed: the loop over GPUs, and the Slurm script with a stand-in for srun."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_preprocess import SIZE, Opened, preprocess

SCRIPT = ROOT / "docs" / "preprocess.slurm"


def flags(cache, model, clips):
    told = {"cache": cache, "dataset": "squares", "pretrained_model_name_or_path": model, "dataset_name": clips}
    return [word for name, value in told.items() for word in (f"--{name}", str(value))] + SIZE


def slurm(words, index, folder, **environment):
    """Run the script as Slurm runs a task of an array; `srun` runs what it is given."""
    folder.mkdir(exist_ok=True)
    (folder / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (folder / "srun").chmod(0o755)
    told = {
        "SLURM_ARRAY_TASK_ID": str(index),
        "SLURM_ARRAY_TASK_COUNT": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_CPUS_PER_TASK": "1",
        "LATENTREEL_PYTHON": sys.executable,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *words], cwd=folder, env={**os.environ, **told, **environment}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tiny_2b, clips, tmp_path_factory):
    """The version of the data set that one worker makes."""
    return preprocess(tmp_path_factory.mktemp("alone"), tiny_2b, clips).dataset.digest


@pytest.mark.slow
def test_the_tasks_of_a_slurm_array_make_the_data_set_of_one_process(alone, tiny_2b, clips, tmp_path):
    cache = tmp_path / "cache"
    for index in (1, 0):
        done = slurm(flags(cache, tiny_2b, clips), index, tmp_path / "bin", LATENTREEL_WORKERS="2")
        assert done.returncode == 0, done.stderr
    assert Opened(cache, "squares").dataset.digest == alone


def test_a_task_beyond_the_workers_is_refused(tmp_path):
    done = slurm([], 16, tmp_path / "bin")
    assert done.returncode == 2
    assert done.stderr == (
        "error: array task 16; must be below 16: let --array and LATENTREEL_WORKERS agree\n"
    )  # fmt: skip


def test_the_array_and_the_workers_of_the_script_agree():
    text = SCRIPT.read_text()
    first, last = map(int, re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", text, re.MULTILINE)[0])
    assert (first, last + 1) == (0, int(re.findall(r"LATENTREEL_WORKERS:-(\d+)", text)[0]))


@pytest.mark.slow
def test_the_loop_over_gpus_makes_the_data_set_of_one_process(alone, tiny_2b, clips, tmp_path):
    (block,) = re.findall(r"    for index in .*?\n    wait\n", (ROOT / "docs/many_workers.md").read_text(), re.DOTALL)
    words = flags(tmp_path / "cache", tiny_2b, clips)
    pairs = zip(words[::2], words[1::2], strict=True)
    (tmp_path / "my.toml").write_text(
        "".join(f"{name[2:]} = {value if value.isdigit() else repr(value)}\n" for name, value in pairs)
    )
    loop = block.replace("my_preprocess.toml", str(tmp_path / "my.toml")).replace("python", sys.executable)
    done = subprocess.run(
        ["bash", "-c", loop], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert Opened(tmp_path / "cache", "squares").dataset.digest == alone, done.stderr
