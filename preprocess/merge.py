"""`python -m preprocess.merge`: see `--help` and docs/many_workers.md."""

from __future__ import annotations

from dataclasses import dataclass

from tyro.conf import Positional

from preprocess.inventory import open_cache
from preprocess.share import list_shares, merge
from shared.config import check_name, parse_config
from shared.console import say
from shared.errors import CacheError, ConfigError, run_command


@dataclass(frozen=True)
class MergeConfig:
    """Make a data set of what the workers of stage 1 (--num_workers) have handed over; again makes the same one."""

    cache: Positional[str]
    """The cache: a folder or a URL."""
    dataset: str = "default"
    """Name of the data set."""
    num_workers: int | None = None
    """How many workers there were; needed where the cache holds the shares of several runs."""

    def __post_init__(self) -> None:
        check_name(self.dataset)
        if self.num_workers is not None and self.num_workers < 1:
            raise ConfigError(f"--num_workers {self.num_workers}; must be at least 1")


def main(argv: list[str]) -> int:
    """Merge the shares and print what the workers did."""
    config = parse_config(MergeConfig, argv, "python -m preprocess.merge")
    cache = open_cache(config.cache)
    sizes = sorted({workers for _, workers in list_shares(cache, config.dataset)})
    if not sizes:
        raise CacheError(f"{cache.url}: holds no shares of a data set {config.dataset!r}; run its workers first")
    if config.num_workers is None and len(sizes) > 1:
        known = " and ".join(map(str, sizes))
        raise CacheError(f"{cache.url}: holds shares of runs of {known} workers; say which with --num_workers")
    with cache.writer() as writer:
        report, digest = merge(cache, writer, config.dataset, config.num_workers or sizes[0])
    report.tell()
    say("data set", f"{config.cache}/datasets/{config.dataset}, version {digest[:12]}", digest=digest)
    return 0


if __name__ == "__main__":
    run_command(main)
