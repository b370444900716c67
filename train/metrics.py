"""metrics.jsonl: a row per optimizer step, on disk before a checkpoint gets its name. holdout.jsonl: a row per look."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from shared.storage import write_atomically

FILE = "metrics.jsonl"
HOLDOUT_FILE = "holdout.jsonl"


class Metrics:
    """Writes rows; those after `step` that an interrupted run left are cut off first.

    Args:
        step: the step that the run goes on from; 0 for a new run.
    """

    def __init__(self, output_dir: Path, step: int, file: str = FILE) -> None:
        self._path = output_dir / file
        kept = [line for line in _whole_lines(self._path) if step and json.loads(line)["step"] <= step]
        write_atomically(self._path, "".join(f"{line}\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Add a row."""
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file without a last one that a crash cut short."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    return [line.decode() for line in whole]
