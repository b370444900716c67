"""What a command tells while it works: lines of its story, warnings, and how far it is.

    say("data set", "...")      "data set  ..." on stdout
    warn("...")                 "warning   ..." on stderr
    Progress(clips, ...)        a bar with rate and ETA on stderr where that is a terminal, else now and then a line
                                that begins with the time
    show("...")                 what the command was asked for, such as a table: on stdout, whatever the flags are

`--quiet` leaves warnings and errors, `--log_json` makes each line but those of `show` one JSON object, on the same
stream: time, level, stage, event, message and fields.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Generic, TextIO, TypeVar

T = TypeVar("T")

LABEL = 9  # columns of a line's label
FIRST_SECONDS, MOST_SECONDS = 10.0, 60.0  # between two lines of progress: a 20th of what has passed, within these


@dataclass(frozen=True)
class Terminal:
    """The flags that every command has: they are about the terminal, not about what is made."""

    quiet: bool = False
    """Print errors and warnings only; what a command was asked for, such as a table, is printed all the same."""
    log_json: bool = False
    """Print each line as one JSON object: time, level, stage, event, message, fields."""
    debug: bool = False
    """Print the traceback of an error, too."""


class _Console:
    """The state of this process's terminal: what it was told, and the bars that stand on it."""

    terminal = Terminal()
    stage = ""
    bars = 0


def configure(terminal: Terminal, stage: str) -> None:
    """Set how this process tells things.

    Args:
        stage: the command's module, such as train.plan.
    """
    _Console.terminal, _Console.stage = terminal, stage


def terminal() -> Terminal:
    """How this process tells things."""
    return _Console.terminal


def has_bars() -> bool:
    """Whether progress is a bar: on a terminal, where neither --quiet nor --log_json is given."""
    told = _Console.terminal
    return sys.stderr.isatty() and not told.quiet and not told.log_json


def say(event: str, message: str, *, label: bool = True, **fields: Any) -> None:
    """Tell a line of the story, on stdout.

    Args:
        event: what it is about, in LABEL letters.
        label: whether the line begins with it.
        fields: what a program would want of the message.
    """
    if not _Console.terminal.quiet:
        _tell(sys.stdout, "info", event, message, fields, f"{event:<{LABEL}} " if label else "")


def warn(message: str, event: str = "warning", **fields: Any) -> None:
    """Tell what the user should see, on stderr, and go on."""
    _tell(sys.stderr, "warning", event, message, fields, f"{event:<{LABEL}} ")


def fail(message: str, traceback: str | None = None) -> None:
    """Tell of the error that ends the command, on stderr."""
    if _Console.terminal.log_json:
        _tell(sys.stderr, "error", "error", message, {"traceback": traceback} if traceback else {}, "")
    else:
        _write(sys.stderr, f"{traceback or ''}error: {message}")


def show(line: str) -> None:
    """Print a line of what the command was asked for, on stdout."""
    _write(sys.stdout, line)


class Progress(Generic[T]):
    """How far a long piece of work is; to iterate over, or a context to be told by `update`.

    What takes less than FIRST_SECONDS leaves no line where there is no terminal.

    Args:
        items: what is worked on, one by one.
        name: what they are called, such as clips.
        unit: one of them, such as clip.
        total: how many there are; default: as many as `items` has, where it can tell.
        start: how many were done before.
        leave: whether the bar stays on the terminal when all is done.
        shown: False on the ranks of a run that tell nothing.
    """

    def __init__(
        self,
        items: Iterable[T] = (),
        *,
        name: str,
        unit: str,
        total: int | None = None,
        start: int = 0,
        leave: bool = True,
        shown: bool = True,
    ) -> None:
        self._items, self._name, self._unit = items, name, unit
        self._total = len(items) if total is None and isinstance(items, Sized) and items else total
        self._start = self._done = start
        self._fields: dict[str, Any] = {}
        self._shown = shown and not _Console.terminal.quiet
        self._began = self._told = time.monotonic()
        self._has_told = False
        self._bar: Any = None
        if self._shown and has_bars():
            from tqdm import tqdm  # late: --help does not pay for it

            self._bar = tqdm(
                total=self._total, initial=start, desc=name, unit=unit, leave=leave, dynamic_ncols=True, file=sys.stderr
            )
            _Console.bars += 1

    def __iter__(self) -> Iterator[T]:
        with self:
            for item in self._items:
                yield item
                self.update()

    def __enter__(self) -> Progress[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, count: int = 1, **fields: Any) -> None:
        """So many more are done; the fields, such as the loss, are told beside."""
        self._done += count
        self._fields.update(fields)
        if self._bar is not None:
            if fields:
                self._bar.set_postfix(self._fields, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        pause = min(max((now - self._began) / 20, FIRST_SECONDS), MOST_SECONDS)
        if self._shown and now - self._told >= pause and self._done != self._total:  # of the end `close` tells
            self._tell_line(now)

    def close(self) -> None:
        """All is done, or as much as will be."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            _Console.bars -= 1
            return
        now = time.monotonic()
        if self._shown and (self._has_told or now - self._began >= FIRST_SECONDS):
            self._tell_line(now, ended=True)
        self._shown = False  # closing again tells nothing

    def _tell_line(self, now: float, *, ended: bool = False) -> None:
        self._told, self._has_told = now, True
        seconds, done = now - self._began, self._done - self._start
        rate = done / seconds if seconds > 0 else 0.0
        left = (self._total - self._done) / rate if rate and self._total is not None else None
        of_all = "" if self._total is None else f" of {self._total}"
        parts = [f"{self._done}{of_all}", _rate(rate, self._unit)]
        if ended:
            parts.append(f"took {_duration(seconds)}")
        elif left is not None:
            parts.append(f"{_duration(left)} left")
        parts += [f"{name} {_short(value)}" for name, value in self._fields.items()]
        fields = {
            "done": self._done,
            "total": self._total,
            "unit": self._unit,
            "rate": round(rate, 4),
            "seconds": round(seconds, 3),
            "seconds_left": None if left is None or ended else round(left, 1),
            **self._fields,
        }
        begin = f"{datetime.now():%Y-%m-%d %H:%M:%S} {self._name:<{LABEL}} "
        _tell(sys.stderr, "info", self._name, ", ".join(parts), fields, begin)


def _tell(stream: TextIO, level: str, event: str, message: str, fields: dict[str, Any], begin: str) -> None:
    """Write a line; that it begins with something is for people only."""
    if not _Console.terminal.log_json:
        _write(stream, begin + message)
        return
    line = {
        "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        "level": level,
        "stage": _Console.stage,
        "event": event.lower().replace(" ", "_"),
        "message": message,
        "fields": fields,
    }
    _write(stream, json.dumps(line, ensure_ascii=False, default=str))


def _write(stream: TextIO, line: str) -> None:
    if _Console.bars:
        from tqdm import tqdm  # as above

        tqdm.write(line, file=stream)  # above the bars
        stream.flush()
    else:
        print(line, file=stream, flush=True)


def _rate(rate: float, unit: str) -> str:
    """Items a second, or where that is below 1, seconds an item."""
    if 0 < rate < 1:
        return f"{1 / rate:.3g} s a {unit}"
    return f"{rate:.3g} {unit}s a second"


def _duration(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{left:02}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
