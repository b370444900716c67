"""What the samples of a data set are like as a whole: how many of each bucket, length and number of tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shared.dataset import DataSet
from shared.errors import CacheError

BARS = 24  # of a histogram, and one more where its ranges are moved to a limit


@dataclass
class Census:
    """Counts over all samples of a version, and over its rejected clips.

    Attributes:
        seconds: of all clips, at their rates.
        rejected: by reason.
        refused: the first rows of rejected.parquet.
    """

    buckets: Counter[str] = field(default_factory=Counter)
    frames: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    truncated: int = 0
    seconds: float = 0.0
    rejected: Counter[str] = field(default_factory=Counter)
    refused: list[dict[str, Any]] = field(default_factory=list)


def count_samples(dataset: DataSet, refused: int) -> Census:
    """Count a version's samples, column by column.

    Args:
        refused: rejected clips that are kept as rows.

    Raises:
        CacheError: samples.parquet or rejected.parquet cannot be read.
    """
    census = Census()
    for batch in dataset.batches("bucket", "frames", "tokens", "truncated", "fps"):
        for name in ("bucket", "frames", "tokens"):
            counts = getattr(census, f"{name}s" if name == "bucket" else name)
            for entry in pc.value_counts(batch[name]).to_pylist():
                counts[entry["values"]] += entry["counts"]
        census.truncated += pc.sum(batch["truncated"]).as_py() or 0
        census.seconds += pc.sum(pc.divide(batch["frames"].cast(pa.float64()), batch["fps"])).as_py() or 0.0
    storage, path = dataset.cache.storage, f"{dataset.folder}/rejected.parquet"
    try:
        source = storage.local(path) if storage.is_local else pa.BufferReader(storage.read(path))
        with pq.ParquetFile(source, page_checksum_verification=True) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                for entry in pc.value_counts(table["reason"]).to_pylist():
                    census.rejected[entry["values"]] += entry["counts"]
                census.refused += table.slice(0, max(0, refused - len(census.refused))).to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise CacheError(f"{storage.full(path)}: cannot be read ({error}); run stage 1 again for it") from error
    return census


def bars(counts: Counter[int], limit: int | None = None) -> list[dict[str, Any]]:
    """A histogram of whole numbers: a bar a value, or equal ranges where there are more than BARS values.

    Args:
        limit: ranges do not straddle it; those above are marked.
    """
    if not counts:
        return []
    low, high = min(counts), max(counts)
    width = 1
    if len(counts) > BARS or (limit is not None and high > low):
        width = max(1, -(-(high - low + 1) // BARS))
        low = limit + 1 - width * -(-(limit + 1 - low) // width) if limit is not None else low
    starts = range(low, high + 1, width) if width > 1 or limit is not None else sorted(counts)
    inside: Counter[int] = Counter()
    for value, count in counts.items():
        inside[value - (value - low) % width] += count
    ranges = [(start, start + width - 1, inside[start]) for start in starts]
    most = max(count for _, _, count in ranges)
    return [
        {
            "label": f"{max(first, 0)}" if first == last else f"{max(first, 0)} to {last}",
            "count": count,
            "share": count / most,
            "over": limit is not None and first > limit,
        }
        for first, last, count in ranges
    ]
