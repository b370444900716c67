"""What a run of stage 1 did: counted while it works, printed at its end, kept as report.json."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from shared.errors import REJECTION_REASONS

LISTED = 10  # names in one line of the summary; samples.parquet has them all


@dataclass
class Report:
    """Counts by kind of store (`latents`, `images`, `embeddings`), rejections by reason, seconds by phase."""

    encoded: Counter[str] = field(default_factory=lambda: Counter(latents=0, images=0, embeddings=0))
    reused: Counter[str] = field(default_factory=lambda: Counter(latents=0, images=0, embeddings=0))
    rejected: Counter[str] = field(default_factory=Counter)
    buckets: Counter[str] = field(default_factory=Counter)
    truncated: list[str] = field(default_factory=list)  # sources whose prompt is longer than the text encoder takes
    duplicates: dict[str, list[str]] = field(default_factory=dict)  # sources of each caption that several clips have
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

    def count_captions(self, rows: list[dict[str, Any]]) -> None:
        """Note the truncated prompts and the captions that stand on several clips, from rows of samples.parquet."""
        self.truncated = [row["source"] for row in rows if row["truncated"]]
        by_caption: dict[str, list[str]] = {}
        for row in rows:
            by_caption.setdefault(row["caption"], []).append(row["source"])
        self.duplicates = {caption: sources for caption, sources in by_caption.items() if len(sources) > 1}

    def to_dict(self) -> dict[str, Any]:
        """As report.json holds it."""
        return {
            "encoded": dict(self.encoded),
            "reused": dict(self.reused),
            "rejected": dict(sorted(self.rejected.items())),
            "buckets": dict(sorted(self.buckets.items())),
            "truncated": len(self.truncated),
            "duplicate_captions": len(self.duplicates),
            "tiling": self.tiling,
            "bytes": dict(self.bytes),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
        }

    def lines(self) -> Iterator[str]:
        """The summary as it is printed."""
        for name, counts in (("encoded", self.encoded), ("reused", self.reused)):
            images = f", {counts['images']} images" if counts["images"] else ""
            yield f"{name:<9} {counts['latents']} clips, {counts['embeddings']} prompts{images}"
        for reason, count in sorted(self.rejected.items()):
            yield f"rejected  {count} {reason}: {REJECTION_REASONS[reason]}"
        for bucket, count in sorted(self.buckets.items()):
            yield f"bucket    {bucket}: {count} clips"
        if self.truncated:
            yield f"truncated {len(self.truncated)} prompts, longer than T5 may read: {_listed(self.truncated)}"
        for caption, sources in list(self.duplicates.items())[:LISTED]:
            yield f"duplicate caption {caption[:60]!r} of {len(sources)} clips: {_listed(sources)}"
        if len(self.duplicates) > LISTED:
            yield f"duplicate captions: {len(self.duplicates) - LISTED} more"
        if self.tiling:
            size = f"{self.tiling['height']}x{self.tiling['width']}"
            yield f"tiles     {size} pixels; --check_tiling tells what they change"
        yield f"written   {sum(self.bytes.values()) / 1e6:,.1f} MB"
        yield "seconds   " + ", ".join(f"{name} {value:.1f}" for name, value in self.seconds.items())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f", and {len(names) - LISTED} more" if len(names) > LISTED else "")
