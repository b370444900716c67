"""`python -m preprocess`: see `--help` and docs/preprocess.md."""

from __future__ import annotations

import signal
import sys

from preprocess.config import PreprocessConfig
from shared.config import parse_config
from shared.errors import run_command


def main(argv: list[str]) -> int:
    """Run stage 1 and print what it did."""
    config = parse_config(PreprocessConfig, argv, "python -m preprocess")
    from preprocess.pipeline import check_tiling, preprocess  # late: --help and a typo are answered at once

    if config.check_tiling:
        for line in check_tiling(config):
            print(line)
        return 0
    report, rejected, digest = preprocess(config)
    for clip in rejected:
        print(f"rejected: {clip.record.origin} {clip.record.source}: {clip.reason} ({clip.detail})", file=sys.stderr)
    print("\n".join(report.lines()))
    print(f"data set  {config.cache}/datasets/{config.dataset}, version {digest[:12]}")
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # an orderly end: children and unfinished files go, the rest stays
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    run_command(main)
