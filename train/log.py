"""What a run tells while it goes on: rows to files and trackers, a hint, and the end of a run that only makes NaN."""

from __future__ import annotations

from collections import defaultdict, deque
from statistics import median
from typing import Any

import torch

from shared.console import LABEL, Progress, say, warn
from shared.errors import UserError
from train.metrics import HOLDOUT_FILE, Metrics
from train.run import Run
from train.trackers import track_holdout, track_step

DATA_SHARE = 0.05  # of the time, spent waiting for data, from which on a hint is due
HINT_AFTER = 20  # steps, not counting the first ones, in which readers and kernels start
WARM_UP = 5
SLOW, SLOW_AFTER = 3, 5  # so many times the median, so many steps in a row
SLOW_MEMORY = 50  # steps of a bucket that the median is of


class DataWait:
    """Notices a loop that waits for its data. It is said once."""

    def __init__(self) -> None:
        self._steps: deque[tuple[float, float]] = deque(maxlen=HINT_AFTER)
        self._seen, self._told = 0, False

    def hint(self, row: dict[str, Any]) -> str | None:
        """Take the next row of metrics.jsonl; what there is to say after it."""
        self._seen += 1
        if self._told or self._seen <= WARM_UP:
            return None
        self._steps.append((row["data_seconds"], row["seconds"]))
        data, whole = map(sum, zip(*self._steps, strict=True))
        if len(self._steps) < HINT_AFTER or data <= DATA_SHARE * whole:
            return None
        self._told = True
        return (
            f"hint      {data / whole:.0%} of the last {HINT_AFTER} steps was spent waiting for data; raise "
            "--dataloader_num_workers or --prefetch, or give --local_cache for a remote cache"
        )


class SlowSteps:
    """Notices steps that suddenly take much longer than those of their bucket did. It is said once.

    A driver that moves the GPU's memory to the host where it runs out, in place of an error, does that.
    """

    def __init__(self) -> None:
        self._usual: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=SLOW_MEMORY))
        self._row, self._seen, self._told = 0, 0, False

    def warning(self, row: dict[str, Any], bucket: str) -> str | None:
        """Take the next row of metrics.jsonl, whose clips are of this bucket; what there is to say after it."""
        self._seen += 1
        if self._told or self._seen <= WARM_UP:
            return None
        seconds, usual = row["seconds"] - row["data_seconds"], self._usual[bucket]
        if len(usual) < WARM_UP or seconds <= SLOW * median(usual):
            usual.append(seconds)
            self._row = 0
            return None
        self._row += 1
        if self._row < SLOW_AFTER:
            return None
        self._told = True
        return (
            f"warning   {SLOW_AFTER} steps in a row took over {SLOW} times as long as earlier ones of their bucket: "
            f"{seconds:.1f} s for {median(usual):.1f} s, of {bucket}; another program may use this GPU, or the "
            "driver moves its memory to the host; see `python -m train.plan --device_memory` for levers"
        )


def is_watched(device: torch.device) -> bool:
    """Whether steps that slow down are told: a CPU's do for many reasons."""
    return device.type == "cuda"


class BadSteps:
    """Counts steps in a row that were not taken because their loss or gradient was not finite.

    Args:
        most: `--max_bad_steps`.
    """

    def __init__(self, most: int) -> None:
        self._most, self._row = most, 0

    def warning(self, row: dict[str, Any]) -> str | None:
        """Take the next row of metrics.jsonl; what there is to say of it.

        Raises:
            UserError: as many as `most` in a row.
        """
        if not row["skipped"]:
            self._row = 0
            return None
        self._row += 1
        bad = [sample for sample, loss in zip(row["samples"], row["losses"], strict=True) if loss is None]
        if not row["samples"]:
            what = "no sample of it could be read"
        elif bad:
            what = f"the loss of {', '.join(bad)} is not finite"
        else:
            what = f"the gradient of {', '.join(row['samples'])} is not finite"
        told = f"step {row['step']}: {what}"
        if self._row < self._most:
            return f"warning   {told}; the step was skipped"
        raise UserError(
            f"{told}; it is step {self._row} of --max_bad_steps {self._most} in a row: lower --learning_rate, give "
            "--mixed_precision bf16 or no, or look at these samples with `python -m preprocess.verify`"
        )


class Log:
    """Takes the rows of a run, on every rank; the main one writes and tells them."""

    def __init__(self, run: Run) -> None:
        self._run, self._wait, self._bad = run, DataWait(), BadSteps(run.config.max_bad_steps)
        self._slow = SlowSteps() if is_watched(run.accelerator.device) else None
        self._metrics = self._holdout = None
        if run.is_main:
            self._metrics = Metrics(run.output_dir, run.first_step)
            self._holdout = Metrics(run.output_dir, run.first_step, HOLDOUT_FILE) if run.held_out else None
        self._progress = Progress[None](
            name="steps", unit="step", total=run.max_steps, start=run.first_step, shown=run.is_main
        )

    def steps(self, rows: list[dict[str, Any]]) -> None:
        """Take the rows of metrics.jsonl of the steps since the last call.

        Raises:
            UserError: too many steps in a row were not finite.
        """
        for row in rows:
            if self._metrics:
                self._metrics.write(row)
            track_step(self._run, row)
            slow = self._slow.warning(row, self._bucket(row)) if self._slow else None
            for line in (self._wait.hint(row), slow, self._bad.warning(row)):
                self._say(line)
        self._progress.update(len(rows), loss=rows[-1]["loss"], lr=rows[-1]["lr"])

    def held_out(self, step: int, found: dict[str, Any]) -> None:
        """Take the held-out loss after a step."""
        row = {"step": step, **found}
        if self._holdout:
            self._holdout.write(row)
        track_holdout(self._run, row)
        if self._run.is_main:
            say("held out", f"{found['loss']:.6f} after step {step}, {found['samples']} clips", **row)

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        for file in (self._metrics, self._holdout):
            if file:
                file.sync()

    def close(self) -> None:
        """Close the files."""
        self._progress.close()
        for file in (self._metrics, self._holdout):
            if file:
                file.close()

    def _bucket(self, row: dict[str, Any]) -> str:
        """That of a step's clips; the first place of a batch is always filled."""
        samples, first = self._run.samples, self._run.sampler.batch(row["step"] - 1)[0]
        return samples.bucket_names[samples.buckets[first]]

    def _say(self, line: str | None) -> None:
        """Tell a line that begins with its label."""
        if line and self._run.is_main:
            label, message = line[:LABEL].strip(), line[LABEL:].strip()
            if label == "warning":
                warn(message)
            else:
                say(label, message)
