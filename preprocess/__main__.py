"""`python -m preprocess`: see `--help` and docs/preprocess.md."""

from __future__ import annotations

import signal
import sys

from preprocess.config import PreprocessConfig
from shared.config import parse_config
from shared.console import say, show, warn
from shared.errors import run_command


def main(argv: list[str]) -> int:
    """Run stage 1 and print what it did."""
    config = parse_config(PreprocessConfig, argv, "python -m preprocess")
    if config.check_tiling:
        from preprocess.seams import check_tiling  # late: --help and a typo are answered at once

        for line in check_tiling(config):
            show(line)
        return 0
    if config.plan:
        from preprocess.forecast import forecast  # late, as above

        for line in forecast(config):
            show(line)
        return 0
    from preprocess.pipeline import preprocess  # late, as above

    outcome = preprocess(config)
    for clip in outcome.rejected:
        warn(
            f"{clip.record.origin} {clip.record.source}: {clip.reason} ({clip.detail})", "rejected", reason=clip.reason
        )
    if outcome.rejected_count > len(outcome.rejected):
        warn(f"{outcome.rejected_count - len(outcome.rejected)} more", "rejected")
    outcome.report.tell()
    if outcome.digest:
        told = f"{config.cache}/datasets/{config.dataset}, version {outcome.digest[:12]}"
        say("data set", told, digest=outcome.digest)
    else:
        waiting = ", ".join(map(str, outcome.waiting_for))
        say("share", f"{config.worker_index} of {config.num_workers} is handed over; not there yet: {waiting}")
    return 0


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # an orderly end: children and unfinished files go, the rest stays
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    run_command(main)
