"""`python -m train.report`: see `--help` and docs/report.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from shared.config import parse_config
from shared.console import say
from shared.errors import ConfigError, run_command
from shared.storage import write_atomically


@dataclass(frozen=True)
class ReportConfig:
    """Show one or several runs side by side on one HTML page: curves, configurations, validation videos."""

    runs: Positional[tuple[str, ...]]
    """The runs: their --output_dir."""
    output: str | None = None
    """The page; default: report.html in the run's folder, or, of several runs, in the current one."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("no run is given; name the --output_dir of one or more")


def main(argv: list[str]) -> int:
    """Write the page."""
    config = parse_config(ReportConfig, argv, "python -m train.report")
    from train.page import render  # late: --help and a typo are answered at once
    from train.record import read_record

    folders = list(dict.fromkeys(Path(run).expanduser() for run in config.runs))
    records = [read_record(folder) for folder in folders]
    default = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    place = Path(config.output).expanduser() if config.output else default
    if place.is_dir() or not place.resolve().parent.is_dir():
        raise ConfigError(f"--output {place}: must be a file in a folder that exists")
    write_atomically(place, render(records, place))
    say("report", f"{place}: {len(records)} run{'s' if records[1:] else ''}; open it in a browser")
    return 0


if __name__ == "__main__":
    run_command(main)
