"""`python -m preprocess.preview`: see `--help` and docs/preview.md. Stage 1 writes the first page by itself."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from preprocess.census import Census, count_samples
from preprocess.page import Place, render
from preprocess.strips import read_strips
from shared.cache import Cache
from shared.config import check_name, parse_config
from shared.dataset import DataSet
from shared.errors import ConfigError, run_command
from shared.storage import write_atomically

PAGE_SAMPLES = 2000
REFUSED = 500  # rejected clips that are told one by one
PUBLISH_SECONDS = 30.0  # that reading strips may take when stage 1 publishes
COLUMNS = (
    "sample_id", "caption", "effective_prompt", "weight", "source", "frame_indices", "source_fps", "fps",
    "source_height", "source_width", "crop", "bucket", "latent_key", "latent_part", "mirrored_key", "tokens",
    "truncated",
)  # fmt: skip


@dataclass(frozen=True)
class PreviewConfig:
    """Show a data set on a page: the frames as they were encoded, captions, rejected clips. 2,000 samples a page."""

    cache: Positional[str]
    """The cache: a folder or a URL."""
    dataset: str = "default"
    """Name of the data set in the cache."""
    version: str | None = None
    """First digits of a version; default: the current one."""
    all: bool = False
    """Show all samples: preview.html, preview-2.html, ..."""
    decode: int = 0
    """Add what the VAE makes of the latents of so many samples, spread over the first page, with their PSNR."""
    pretrained_model_name_or_path: str | None = None
    """Checkpoint whose VAE decodes; default: the one that encoded."""
    cache_dir: str | None = None
    """Where the hub's files are kept; default: the hub's own place."""
    output: str | None = None
    """Folder of this machine for the pages; default: the version's own, in the cache."""

    def __post_init__(self) -> None:
        check_name(self.dataset)
        if self.decode < 0:
            raise ConfigError(f"--decode {self.decode}; must be 0 or more samples")


def pages(
    dataset: DataSet, rows: Iterator[dict[str, Any]], census: Census, *, most: int | None, until: float | None = None,
    decoded: dict[str, dict[str, Any]] | None = None,
) -> Iterator[tuple[str, str, int]]:  # fmt: skip
    """The name, the HTML and the number of samples of each page; one is in memory at a time.

    Args:
        rows: COLUMNS of samples.parquet.
        most: pages; None: as many as it takes.
        until: as in `read_strips`.
    """
    total = dataset.num_rows
    count = max(1, -(-total // PAGE_SAMPLES))
    count = count if most is None else min(count, most)
    for number in range(1, count + 1):
        shown = list(islice(rows, PAGE_SAMPLES))
        first = (number - 1) * PAGE_SAMPLES + 1
        place = Place(number, count, first, first + len(shown) - 1)
        strips = read_strips(dataset, shown, until)
        yield Place.name(number), render(dataset, census, shown, strips, place, decoded or {}), len(shown)


def write_preview(cache: Cache, writer: Path, dataset: DataSet) -> None:
    """Put the first page into a version that has just been published.

    It reads the columns that are counted, 2,000 strips at most, and none after PUBLISH_SECONDS; what could not be read
    is told on the page.

    Args:
        writer: the writer's folder.
    """
    until = time.monotonic() + PUBLISH_SECONDS
    for name, html, _ in pages(dataset, dataset.rows(*COLUMNS), count_samples(dataset, REFUSED), most=1, until=until):
        cache.storage.write(f"{dataset.folder}/{name}", html.encode(), writer)


def main(argv: list[str]) -> int:
    """Write the pages."""
    config = parse_config(PreviewConfig, argv, "python -m preprocess.preview")
    from preprocess.inventory import find_version, open_cache, say

    cache = open_cache(config.cache)
    dataset = find_version(cache, config.dataset, config.version)
    folder = Path(config.output).expanduser() if config.output else None
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--output {folder}: cannot be made ({error.strerror}); give a folder") from error
    decoded = {}
    if config.decode:
        from preprocess.reconstruction import reconstruct  # late: torch

        first = list(islice(dataset.rows(*COLUMNS), PAGE_SAMPLES))
        decoded = reconstruct(dataset, first, config.decode, config.pretrained_model_name_or_path, config.cache_dir)
    census, most = count_samples(dataset, REFUSED), None if config.all else 1
    with cache.writer() as writer:
        for name, html, count in pages(dataset, dataset.rows(*COLUMNS), census, most=most, decoded=decoded):
            if folder is None:
                cache.storage.write(f"{dataset.folder}/{name}", html.encode(), writer)
            else:
                write_atomically(folder / name, html)
            place = cache.storage.full(f"{dataset.folder}/{name}") if folder is None else folder / name
            say(f"preview   {place}: {count} samples, {len(html) / 1e6:.1f} MB; open it in a browser")
    return 0


if __name__ == "__main__":
    run_command(main)
