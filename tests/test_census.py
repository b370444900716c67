"""The numbers and histograms of a data set's page, against counting one by one."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.index import INFO, made_up_rows
from preprocess.census import BARS, bars, count_samples
from shared import dataset as datasets
from shared.cache import Cache
from shared.dataset import open_dataset, publish_dataset
from shared.errors import REJECTION_REASONS

REJECTED = [
    {"source": f"{number}.mp4", "caption": "", "reason": [*REJECTION_REASONS][number % 3], "detail": "a detail"}
    for number in range(100)
]


@settings(deadline=None)
@given(
    st.dictionaries(st.integers(1, 400), st.integers(1, 10**7), max_size=80) | st.just({7: 1, 10**6: 2}),
    st.none() | st.integers(1, 400),
)
def test_a_histogram_counts_each_value_once(values, limit):
    counts = Counter(values)
    told = bars(counts, limit)
    assert len(told) <= BARS + 1
    assert sum(bar["count"] for bar in told) == counts.total()
    ends = [[int(word) for word in bar["label"].split(" to ")] for bar in told]
    for bar, edges in zip(told, ends, strict=True):
        first, last = edges[0], edges[-1]
        assert bar["count"] == sum(count for value, count in values.items() if first <= value <= last)
        assert bar["share"] == bar["count"] / max(bar["count"] for bar in told)
        assert bar["over"] == (limit is not None and first > limit)
        assert limit is None or not first <= limit < last, "no range holds both what is read and what is cut off"
    if limit is None and len(values) <= BARS:
        assert [edges[0] for edges in ends] == sorted(values), "a bar a value"
    else:
        assert all(edges[-1] + 1 == after[0] for edges, after in pairwise(ends)), "no gap"
        assert len({edges[-1] - edges[0] for edges in ends[1:]}) <= 1, "equal ranges"


def test_counts_are_those_of_the_rows(tmp_path, monkeypatch):
    """Over several row groups of both tables."""
    monkeypatch.setattr(datasets, "BATCH_ROWS", 10)
    monkeypatch.setattr(datasets, "ROW_GROUP", 40)
    rng, rows = np.random.default_rng(0), list(made_up_rows(130, False))
    for row in rows:
        tokens, frames = int(rng.integers(1, 300)), int(rng.choice([9, 49, 81]))
        row |= {"tokens": tokens, "truncated": tokens > 226, "frames": frames, "fps": float(rng.choice([7.992, 16]))}
        row["bucket"] = f"{frames}x480x{rng.choice([480, 720])}"
    cache = Cache(str(tmp_path))
    with cache.writer() as writer:
        publish_dataset(cache, writer, "many", INFO, rows, REJECTED, dict)
    dataset = open_dataset(cache, "many")
    assert dataset._file.num_row_groups == 4
    census = count_samples(dataset, refused=50)
    for name, counts in (("bucket", census.buckets), ("frames", census.frames), ("tokens", census.tokens)):
        assert counts == Counter(row[name] for row in rows)
    assert census.truncated == sum(row["truncated"] for row in rows) > 0
    assert census.seconds == pytest.approx(sum(row["frames"] / row["fps"] for row in rows))
    assert census.rejected == Counter(row["reason"] for row in REJECTED)
    assert census.refused == REJECTED[:50]
