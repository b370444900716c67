"""The curves of a run: metrics.jsonl, of any length, read once into at most `POINTS` points; and holdout.jsonl.

A point stands for `width` neighbouring steps and keeps, of each column, the sum, the count, the least and the greatest
value; when the points would become too many, neighbours are merged and `width` doubles. So a mean over points,
weighted by their counts, is the mean over all steps, and memory does not grow with the run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import ConfigError
from train.metrics import FILE

POINTS = 1000  # of one curve, at most
TIMESTEPS = 1000  # of the noise schedule
QUARTILES = tuple((first, first + TIMESTEPS // 4 - 1) for first in range(0, TIMESTEPS, TIMESTEPS // 4))
PHASES = ("data_seconds", "forward_seconds", "backward_seconds", "optimizer_seconds")
SCALARS = ("loss", "lr", "grad_norm", "lora_norm", "seconds", *PHASES)
QUARTILE_COLUMNS = ("loss_q1", "loss_q2", "loss_q3", "loss_q4")
COLUMNS = (*SCALARS, *QUARTILE_COLUMNS)
WINDOW = 50  # a smoothed value is the mean over a 25th of the curve: its own point, and a 50th to each side
HOLDOUT_FILE = "holdout.jsonl"


class Bin:
    """What is kept of some values: enough for their mean and their range."""

    __slots__ = ("count", "high", "low", "total")

    def __init__(self) -> None:
        self.total, self.count, self.low, self.high = 0.0, 0, float("inf"), float("-inf")

    def add(self, value: float) -> None:
        """Add one value."""
        self.total += value
        self.count += 1
        self.low = min(self.low, value)
        self.high = max(self.high, value)

    def merge(self, other: Bin) -> None:
        """Add all that another stands for."""
        self.total += other.total
        self.count += other.count
        self.low = min(self.low, other.low)
        self.high = max(self.high, other.high)

    @property
    def mean(self) -> float | None:
        """None where there is no value."""
        return self.total / self.count if self.count else None


@dataclass
class Point:
    """Neighbouring steps.

    Attributes:
        last: the last step that it holds.
        samples: that were trained on in these steps.
        skipped: steps that were not taken, because loss or gradient was not finite.
    """

    first: int
    last: int
    samples: int = 0
    skipped: int = 0
    bins: dict[str, Bin] = field(default_factory=dict)

    def add(self, column: str, value: float) -> None:
        """Add a value to a column."""
        held = self.bins.get(column)
        if held is None:
            held = self.bins[column] = Bin()
        held.add(value)

    def merge(self, other: Point) -> None:
        """Take in the steps of another."""
        self.first, self.last = min(self.first, other.first), max(self.last, other.last)
        self.samples += other.samples
        self.skipped += other.skipped
        for name, held in other.bins.items():
            if name in self.bins:
                self.bins[name].merge(held)
            else:
                self.bins[name] = held


@dataclass(frozen=True)
class Curves:
    """A run's rows, in the order of their steps.

    Attributes:
        width: steps that a point stands for; a power of two, 1 where each step is a point of its own.
        points: at most `POINTS`; none where the run has taken no step yet.
    """

    width: int
    points: list[Point]

    @property
    def last_step(self) -> int:
        """The last step that has a row; 0 where none has."""
        return self.points[-1].last if self.points else 0

    @property
    def samples(self) -> int:
        """Samples trained on, each as often as it was."""
        return sum(point.samples for point in self.points)

    @property
    def skipped(self) -> int:
        """Steps that were not taken."""
        return sum(point.skipped for point in self.points)

    @property
    def seconds(self) -> float:
        """Time spent in steps."""
        return sum(point.bins["seconds"].total for point in self.points if "seconds" in point.bins)

    def means(self, column: str) -> list[float | None]:
        """The mean of a column at each point; None where no step of the point has a value."""
        return [held.mean if (held := point.bins.get(column)) else None for point in self.points]

    def ranges(self, column: str) -> list[tuple[float, float] | None]:
        """The least and the greatest value of a column at each point."""
        return [(held.low, held.high) if (held := point.bins.get(column)) else None for point in self.points]

    def smoothed(self, column: str) -> list[float | None]:
        """The mean of a column around each point, over its window of points: of the values, not of their means."""
        bins = [point.bins.get(column) for point in self.points]
        totals = self._windows([held.total if held else 0.0 for held in bins])
        counts = self._windows([held.count if held else 0 for held in bins])
        return [total / count if count else None for total, count in zip(totals, counts, strict=True)]

    def rates(self) -> list[float | None]:
        """Samples a second at each point."""
        return _ratios([point.samples for point in self.points], self._times())

    def smoothed_rates(self) -> list[float | None]:
        """Samples a second around each point, over its window: all samples by all seconds."""
        return _ratios(self._windows([point.samples for point in self.points]), self._windows(self._times()))

    def _times(self) -> list[float]:
        return [held.total if (held := point.bins.get("seconds")) else 0.0 for point in self.points]

    def _windows(self, values: Sequence[float]) -> list[float]:
        """The sum of the values at each point and within reach of it."""
        reach, size = max(1, len(values) // WINDOW), len(values)
        return [math.fsum(values[max(0, place - reach) : min(size, place + reach + 1)]) for place in range(size)]


def _ratios(samples: Sequence[float], seconds: Sequence[float]) -> list[float | None]:
    return [count / time if count and time else None for count, time in zip(samples, seconds, strict=True)]


def by_quartile(row: dict[str, Any]) -> list[list[float]]:
    """The losses of a row's samples, in the four quartiles of the timesteps; empty lists where the row has none."""
    found: list[list[float]] = [[], [], [], []]
    for timestep, loss in zip(row.get("timesteps") or (), row.get("losses") or (), strict=False):
        if loss is not None:
            found[timestep * 4 // TIMESTEPS].append(loss)
    return found


def read_curves(folder: Path, most: int = POINTS) -> Curves:
    """metrics.jsonl of a run, also of one that is being written.

    Args:
        most: points, at most; an even number.

    Raises:
        ConfigError: there is none, or a line of it is not a row.
    """
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no {FILE}; give the --output_dir of a run")
    width, points = 1, dict[int, Point]()
    for row in read_rows(path):
        step = row["step"]
        point = points.get((step - 1) // width)
        if point is None:
            point = points[(step - 1) // width] = Point(step, step)
        point.last = max(point.last, step)
        _add_row(point, row)
        while len(points) > most:
            width, points = 2 * width, _halved(points)
    return Curves(width, [points[place] for place in sorted(points)])


def _add_row(point: Point, row: dict[str, Any]) -> None:
    point.samples += len(row.get("samples") or ())
    point.skipped += bool(row.get("skipped"))
    for name in SCALARS:
        value = row.get(name)
        if value is not None and math.isfinite(value):  # NaN, which JSON has not but Python writes, would spread
            point.add(name, value)
    for name, losses in zip(QUARTILE_COLUMNS, by_quartile(row), strict=True):
        for loss in filter(math.isfinite, losses):
            point.add(name, loss)


def _halved(points: dict[int, Point]) -> dict[int, Point]:
    merged: dict[int, Point] = {}
    for place, point in points.items():
        if place // 2 in merged:
            merged[place // 2].merge(point)
        else:
            merged[place // 2] = point
    return merged


def read_holdout(folder: Path) -> list[dict[str, Any]]:
    """The rows of holdout.jsonl that have a loss, in the order of their steps; none where there is no such file."""
    path = folder / HOLDOUT_FILE
    rows = read_rows(path) if path.is_file() else iter(())
    measured = (row for row in rows if row.get("loss") is not None and math.isfinite(row["loss"]))
    return sorted(measured, key=lambda row: int(row["step"]))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines, one after the other; a last line without its end is still being written.

    Raises:
        ConfigError: a line is not an object with a step.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
                step = row["step"]
            except (ValueError, LookupError, TypeError) as error:
                raise ConfigError(f"{path}: line {number} is not a row ({error}); mend or remove it") from error
            if not isinstance(step, int):
                raise ConfigError(f"{path}: line {number} has the step {step!r}; must be a whole number")
            yield row
