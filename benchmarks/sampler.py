"""The order of millions of samples: how soon the first batch of a run is known, and one far into it.

`python -m benchmarks.sampler [--samples 10000000]`: each in a process of its own, on made-up buckets.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from benchmarks.fresh import in_fresh_process
from benchmarks.table import show

LIMIT_S, LIMIT_GIB, LIMIT_RATIO = 10.0, 2.0, 1.5
GLOBAL_BATCH = 2
RESUMED_AT = 5_000_000


def batch_at(samples: str, step: str) -> dict[str, Any]:
    """The global batch of a step, asked of a sampler that was asked nothing before; and another of that epoch."""
    import numpy as np

    from train.sampler import Sampler

    buckets = np.random.default_rng(0).choice(3, int(samples), p=(0.7, 0.2, 0.1)).astype(np.uint8)
    busy, started = time.process_time(), time.perf_counter()
    sampler = Sampler(buckets, GLOBAL_BATCH, "digest of a data set", seed=0)
    batch = sampler.batch(int(step)).tolist()
    known, work_s = time.perf_counter(), time.process_time() - busy
    sampler.batch(int(step) - 1 if int(step) else 1)
    return {
        "batch": batch,
        "seconds": known - started,
        "work_s": work_s,
        "another_us": 1e6 * (time.perf_counter() - known),
        "steps_per_epoch": sampler.steps_per_epoch,
    }


def main(samples: int = 10_000_000) -> bool:
    """Measure and print; returns whether all figures are within their limits."""
    first = in_fresh_process("sampler", "batch_at", samples, 0)
    later, again = (in_fresh_process("sampler", "batch_at", samples, RESUMED_AT) for _ in range(2))
    assert later["batch"] == again["batch"], "two processes that resume at one step see two batches"
    epoch, row = divmod(RESUMED_AT, first["steps_per_epoch"])
    return show(
        f"the order of {samples:,} samples in global batches of {GLOBAL_BATCH}",
        [
            ("first batch known", first["seconds"], LIMIT_S, " s"),
            ("first batch known: with Python's start and imports", first["whole_s"], None, " s"),
            ("first batch known: processor time of that", first["cpu_s"], None, " s"),
            ("first batch: peak memory of the process", first["peak_gib"], LIMIT_GIB, " GiB"),
            (f"batch {RESUMED_AT:,} (batch {row:,} of epoch {epoch}) known", later["seconds"], LIMIT_S, " s"),
            (f"batch {RESUMED_AT:,}: peak memory of the process", later["peak_gib"], LIMIT_GIB, " GiB"),
            (f"batch {RESUMED_AT:,} / first, processor time", later["work_s"] / first["work_s"], LIMIT_RATIO, ""),
            ("another batch of that epoch", later["another_us"], None, " us"),
        ],
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000_000)
    raise SystemExit(0 if main(parser.parse_args().samples) else 1)
