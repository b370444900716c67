"""Stage 2 in a test: run in this process or in one of its own, and what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState

from tests.conftest import ROOT, run_command
from train.__main__ import main

SETTINGS = ("--dataset", "squares", "--rank", "4", "--lora_alpha", "2", "--learning_rate", "1e-2")


def words_of(**flags: Any) -> list[str]:
    """`max_train_steps=2, gradient_checkpointing=False` as the command line has it."""
    words: list[str] = []
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def train_here(cache: Path, output_dir: Path, **flags: Any) -> int:
    """Run `python -m train` in this process, on one thread, and return its exit status; a UserError is raised."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)  # accelerate keeps the last run's
    try:
        return main([*SETTINGS, "--cache", str(cache), "--output_dir", str(output_dir), *words_of(**flags)])
    finally:
        AcceleratorState._reset_state(True)
        torch.set_num_threads(threads)


def command(cache: Path, output_dir: Path, *, records: Any = None, **flags: Any) -> list[str]:
    """The words after `python` of such a run in a process of its own; `records`: see `tests/recorded.py`."""
    program = ["train"] if records is None else ["tests.recorded", str(records)]
    return ["-m", *program, *SETTINGS, "--cache", str(cache), "--output_dir", str(output_dir), *words_of(**flags)]


def train_apart(cache: Path, output_dir: Path, **flags: Any) -> subprocess.CompletedProcess[str]:
    """Run it to its end in a process of its own."""
    return run_command(*command(cache, output_dir, **flags))


def start_ranks(ranks: int, *words: str, **environment: str) -> subprocess.Popen[str]:
    """Start torchrun with that many processes on the CPU, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words],
        cwd=ROOT,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def train_on_ranks(
    ranks: int, cache: Path, output_dir: Path, *, records: Any = None, **flags: Any
) -> subprocess.CompletedProcess[str]:
    """Run it to its end on that many processes; `records`: a folder for what `tests/recorded.py` writes."""
    with start_ranks(ranks, *command(cache, output_dir, records=records, **flags)) as launcher:
        out, errors = launcher.communicate(timeout=300)
    return subprocess.CompletedProcess(launcher.args, launcher.returncode, out, errors)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait for a condition, as long as a process lives."""
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with status {process.returncode}"
        assert time.monotonic() < until, "not within its time"
        time.sleep(0.02)


def rows_of(output_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def column(output_dir: Path, name: str) -> list[Any]:
    """One column of metrics.jsonl."""
    return [row[name] for row in rows_of(output_dir)]


def facts_of(output_dir: Path) -> list[list[Any]]:
    """The rows of metrics.jsonl without their times: what a run that goes on must repeat to the last bit."""
    return [
        [row[name] for name in ("step", "epoch", "loss", "lr", "grad_norm", "samples")] for row in rows_of(output_dir)
    ]


def lora_of(folder: Path) -> bytes:
    """The LoRA file of a run or checkpoint."""
    return (folder / "pytorch_lora_weights.safetensors").read_bytes()


def only_line(text: str) -> str:
    """What is printed, when it is one line."""
    (line,) = text.splitlines()
    return line
