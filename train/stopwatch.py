"""Where the time of a step goes: data, forward, backward, optimizer; without making a GPU wait to be asked."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch

PHASES = ("data", "forward", "backward", "optimizer")


class Stopwatch:
    """The laps of one step. On a CPU they are over when they are noted; a GPU is asked by `seconds`.

    Args:
        device: that the step runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]
        self._waited = 0.0

    def lap(self, phase: str) -> None:
        """What was done since the last lap was this phase; one may come more than once."""
        if phase == "data" and self._on_gpu:  # the host waited, the GPU may have been at work
            self._waited += time.perf_counter() - self._host
        self._marks.append((phase, self._now()))

    def _now(self) -> Any:
        self._host = time.perf_counter()
        if not self._on_gpu:
            return self._host
        event = torch.cuda.Event(enable_timing=True)  # not run where this was written: no GPU
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase, and of the whole as `""`. On a GPU the laps must be over.

        On a GPU `data` is the time that it stood still for data, at most what the host waited.
        """
        laps: defaultdict[str, float] = defaultdict(float)
        for (_, before), (phase, after) in zip(self._marks, self._marks[1:], strict=False):
            laps[phase] += before.elapsed_time(after) / 1e3 if self._on_gpu else after - before
        whole = sum(laps.values())
        if self._on_gpu:
            laps["data"] = min(laps["data"], self._waited)
        return {"": whole, **{phase: laps[phase] for phase in PHASES}}
