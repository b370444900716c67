"""`make bench`: every benchmark, one after the other; status 1 when a figure is over its limit."""

from __future__ import annotations

import sys

from benchmarks import index, learning, memory, mutants, preprocess, preview, reader, sampler, stages, step

BENCHMARKS = (step, memory, sampler, index, preview, reader, preprocess, stages, learning, mutants)

if __name__ == "__main__":
    within = [benchmark.main() for benchmark in BENCHMARKS]
    sys.exit(0 if all(within) else 1)
