"""What a run of stage 1 did: counted while it works, printed at its end, kept as report.json."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from preprocess.tally import Tally
from shared.console import say
from shared.errors import REJECTION_REASONS

LISTED = 10  # names in one line of the summary; samples.parquet has them all


@dataclass
class Report:
    """Counts by kind of store (`latents`, `images`, `embeddings`), rejections by reason, seconds by phase."""

    encoded: Counter[str] = field(default_factory=lambda: Counter(latents=0, images=0, embeddings=0))
    reused: Counter[str] = field(default_factory=lambda: Counter(latents=0, images=0, embeddings=0))
    rejected: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)
    truncated: int = 0  # clips whose prompt is longer than the text encoder takes
    truncated_names: list[str] = field(default_factory=list)  # the sources of the first of them
    captions: Tally = field(default_factory=lambda: Tally(names=LISTED))  # and the first sources that have each
    tiling: dict[str, Any] | None = None  # the tiles that the VAE encoded in
    bytes: Counter[str] = field(default_factory=Counter)  # written, tars and indexes
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time spent inside to the phase's seconds."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def counted(self, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of samples.parquet as they are; their buckets, captions and truncated prompts are noted."""
        for row in rows:
            self.buckets[row["bucket"]] += 1
            self.captions.add(row["caption"], row["source"])
            if row["truncated"]:
                self.truncated += 1
                self.truncated_names += [row["source"]] if len(self.truncated_names) < LISTED else []
            yield row

    def add(self, other: dict[str, Any]) -> None:
        """Add what another worker did, as its report.json tells: what it encoded and found, bytes, seconds."""
        for name in ("encoded", "reused", "bytes"):
            getattr(self, name).update(other[name])
        for name, seconds in other["seconds"].items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.tiling = other["tiling"]

    def to_dict(self) -> dict[str, Any]:
        """As report.json holds it."""
        return {
            "encoded": dict(self.encoded),
            "reused": dict(self.reused),
            "rejected": dict(sorted(self.rejected.items())),
            "buckets": dict(sorted(self.buckets.items())),
            "truncated": self.truncated,
            "duplicate_captions": self.captions.repeated(0)[0],
            "tiling": self.tiling,
            "bytes": dict(self.bytes),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def tell(self) -> None:
        """Tell the summary; the first line has all of it for programs."""
        for number, (event, message) in enumerate(self._lines()):
            say(event, message, **({} if number else self.to_dict()))

    def _lines(self) -> Iterator[tuple[str, str]]:
        for name, counts in (("encoded", self.encoded), ("reused", self.reused)):
            images = f", {counts['images']} images" if counts["images"] else ""
            yield name, f"{counts['latents']} clips, {counts['embeddings']} prompts{images}"
        for reason, count in sorted(self.rejected.items()):
            yield "rejected", f"{count} {reason}: {REJECTION_REASONS[reason]}"
        for bucket, count in sorted(self.buckets.items()):
            yield "bucket", f"{bucket}: {count} clips"
        if self.truncated:
            names = _listed(self.truncated_names, self.truncated)
            yield "truncated", f"{self.truncated} prompts, longer than T5 may read: {names}"
        duplicates, first = self.captions.repeated(LISTED)
        for caption, times, sources in first:
            yield "duplicate", f"caption {caption[:60]!r} of {times} clips: {_listed(sources, times)}"
        if duplicates > LISTED:
            yield "duplicate", f"captions: {duplicates - LISTED} more"
        if self.tiling:
            size = f"{self.tiling['height']}x{self.tiling['width']}"
            yield "tiles", f"{size} pixels; --check_tiling tells what they change"
        yield "written", f"{sum(self.bytes.values()) / 1e6:,.1f} MB"
        yield "seconds", ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())


def _listed(names: list[str], count: int) -> str:
    return ", ".join(names) + (f", and {count - len(names)} more" if count > len(names) else "")
